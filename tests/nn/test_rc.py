import torch

from genossm.nn.rc import (
    CHAR_COMPLEMENT,
    complement_tensor,
    join_strands,
    reverse_complement,
    reversed_resets,
    reversed_rows,
    split_strands,
)


def test_complement_agrees_with_the_tokenizer_and_is_its_own_inverse():
    complement = complement_tensor(CHAR_COMPLEMENT, 16)
    assert complement[torch.tensor([7, 8, 9, 10, 11, 15])].tolist() == [10, 9, 8, 7, 11, 15]
    ids, lengths = torch.randint(0, 16, (3, 9)), torch.tensor([9, 4, 1])
    for rows in (None, lengths):
        assert torch.equal(reverse_complement(reverse_complement(ids, complement, rows), complement, rows), ids)


def test_padding_stays_where_it_is():
    x = torch.arange(10).reshape(2, 5)
    assert reversed_rows(x, torch.tensor([5, 3])).tolist() == [[4, 3, 2, 1, 0], [7, 6, 5, 8, 9]]


def test_documents_start_at_the_same_borders_on_the_other_strand():
    resets = torch.tensor([[True, False, False, True, False, True]])
    assert reversed_resets(resets, None).tolist() == [[True, True, False, True, False, False]]
    assert reversed_resets(resets, torch.tensor([5])).tolist()[0][:5] == [True, False, True, False, False]
    assert reversed_resets(None, None) is None


def test_strands_split_as_they_were_joined():
    x, lengths = torch.randn(4, 5, 3), torch.tensor([5, 2])
    torch.testing.assert_close(split_strands(join_strands(x, lengths), lengths), x, atol=0, rtol=0)
