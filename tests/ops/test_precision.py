import pytest
import torch

from genossm.nn.hyena import HyenaFilter
from genossm.ops.precision import products, rounds_fast


def test_products_holds_inside_the_block_alone_even_after_an_error():
    def fails():
        with products("medium"):
            assert torch.get_float32_matmul_precision() == "medium"
            with products("highest"):
                assert torch.get_float32_matmul_precision() == "highest"
            assert torch.get_float32_matmul_precision() == "medium"
            raise KeyError

    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError):
        fails()
    assert torch.get_float32_matmul_precision() == before


def test_positions_of_a_filter_are_never_rounded():
    filters = HyenaFilter(8, 4096)
    exact = filters(4096)
    with products("medium"):
        torch.testing.assert_close(filters(4096), exact, rtol=0, atol=0)


@pytest.mark.skipif(not rounds_fast(), reason="this CPU has no units for bfloat16 matrices")
def test_medium_rounds_factors_to_bfloat16_and_sums_in_float32():
    a, b = torch.randn(256, 512), torch.randn(512, 256)
    with products("medium"):
        rounded = a @ b
    by_hand = a.bfloat16().float() @ b.bfloat16().float()
    torch.testing.assert_close(rounded, by_hand, rtol=1e-4, atol=1e-4)
    assert not torch.equal(rounded, a @ b)
