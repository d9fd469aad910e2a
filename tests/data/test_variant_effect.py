import pytest

from genossm.data.variant_effect import VariantEffect


def test_both_alleles_stand_one_after_the_other_about_the_variant(tmp_path):
    tiny = VariantEffect.tiny(tmp_path)
    whole = tiny.load()
    cut = VariantEffect(path=tiny.path, length=5).load()
    alone = VariantEffect(path=tiny.path, length=5, alleles="alt", tissue="Liver").load()
    for number, example in enumerate(cut.splits["train"]):
        ref, alt = example.sequence[:5], example.sequence[5:]
        assert (ref[2], alt[2]) == ("A", "CG"[number % 2])
        assert ref[:2] + ref[3:] == alt[:2] + alt[3:]
        assert alone.splits["train"][number].sequence == alt
        # Position 100 i + 50 counts from 1.
        assert (example.interval.start, example.interval.end) == (100 * number + 47, 100 * number + 52)
    assert len(whole.splits["train"][0].sequence) == 2 * 41
    assert whole.target.names == ("0", "1")


HEADER = "ref_forward_sequence,alt_forward_sequence,label,chromosome,position\n"


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (HEADER + "ACG,ACG,1,chr1,5\n", {}, "row 0: both alleles have the same sequence"),
        (HEADER + "ACG,ATG,1,chr1,five\n", {}, "position 'five' is no whole number"),
        (HEADER + "ACG,ATG,,chr1,5\n", {}, "no label"),
        (HEADER + "ACG,ATG,1,chr1,5\n", {"length": 9}, "data.length=9 asks for more"),
        (HEADER + "ACG,ATG,1,chr1,5\n", {"tissue": "Lung"}, "no row of tissue 'Lung'; it has: no tissue column"),
        (HEADER + "ACG,ATG,1,chr1,5\n", {"alleles": "one"}, "data.alleles must be one of both, ref, alt"),
        ("sequence,label\nACG,1\n", {}, "lacks the columns ref_forward_sequence"),
    ],
)
def test_mistakes_are_named(text, options, message, tmp_path):
    table = tmp_path / "variants.csv"
    table.write_text(text)
    with pytest.raises(ValueError, match=message):
        VariantEffect(path=str(table), **options).load()
