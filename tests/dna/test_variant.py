import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genossm.dna import alphabet
from genossm.dna.variant import Variant, Vcf, letters, normalise, ref_problem, unscorable, windows

GOLDEN = Path(__file__).parent.parent / "data" / "variants" / "vt_normalize.tsv.gz"

dna = st.text("ACGT", min_size=1, max_size=6)


def apply(variant, codes):
    """The contig with the variant in it."""
    text = letters(codes)
    assert text[variant.start : variant.end] == variant.ref
    return text[: variant.start] + variant.alt + text[variant.end :]


def test_left_normalisation_matches_the_golden_pair():
    with gzip.open(GOLDEN, "rt") as lines:
        rows = [line.rstrip("\n").split("\t") for line in lines if not line.startswith("#")][1:]
    assert len(rows) == 194
    moved = 0
    for pos, ref, alt, true_pos, true_ref, true_alt, first, context in rows:
        codes = alphabet.from_text(context)
        assert ref_problem(Variant("20", int(pos) - 1 - int(first), ref, alt), codes) is None
        got = normalise(Variant("20", int(pos) - 1 - int(first), ref, alt), codes)
        assert (got.start + int(first) + 1, got.ref, got.alt) == (int(true_pos), true_ref, true_alt)
        moved += pos != true_pos
    assert moved == 80


@given(st.text("AC", min_size=4, max_size=30), st.data())
def test_normalised_is_the_same_exchange_and_as_far_left_as_it_goes(text, data):
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, min(len(text), start + 5)))
    alt = data.draw(st.text("AC", min_size=1, max_size=5))
    codes, variant = alphabet.from_text(text), Variant("c", start, text[start:end], alt)
    got = normalise(variant, codes)
    assert apply(got, codes) == apply(variant, codes)
    assert normalise(got, codes) == got
    if variant.ref != variant.alt:
        assert got.ref
        assert got.alt
        assert got.ref[-1] != got.alt[-1] or got.start == 0
        assert got.trimmed().start <= variant.trimmed().start


@pytest.mark.parametrize(
    ("ref", "alt", "reason"),
    [
        ("A", "<DEL>", "symbolic"),
        ("A", "*", "symbolic"),
        ("A", "A[chr2:5[", "breakend"),
        ("A", "]chr2:5]A", "breakend"),
        ("A", "R", "iupac"),
        ("A", "?", "no_sequence"),
        ("acg", "t", None),
    ],
)
def test_what_can_be_scored(ref, alt, reason):
    assert unscorable(ref, alt) == reason


@given(st.integers(0, 199), dna, st.integers(0, 6), st.integers(8, 60), st.sampled_from(["start", "end"]))
def test_windows_are_as_long_as_asked_and_shifted_at_the_ends(start, alt, length, window, anchor):
    codes = np.random.default_rng(start).integers(7, 11, 200, dtype=np.uint8)
    end = min(200, start + length)
    variant = Variant("c", start, letters(codes[start:end]), alt)
    (ref, changed), first, last = windows(variant, [alt], codes, window, anchor)
    assert len(ref) == window
    assert letters(ref[first:last]) == variant.ref
    short = max(0, len(variant.ref) - len(alt))
    assert window - short <= len(changed) <= window
    whole = apply(variant, codes)
    assert letters(changed) in whole
    # What stands before the site (after it, for the other anchor) is the same in both.
    if anchor == "start":
        assert np.array_equal(changed[:first], ref[:first])
    else:
        assert np.array_equal(changed[len(changed) - (window - last) :], ref[last:])


def test_vcf_without_header_or_tabs_is_refused(tmp_path):
    path = tmp_path / "a.vcf"
    path.write_text("20\t5\t.\tA\tC\n")
    with pytest.raises(ValueError, match="#CHROM"):
        Vcf(path)
    path.write_text("#CHROM\tPOS\tID\tREF\tALT\n20 5 . A C\n")
    with pytest.raises(ValueError, match=r"line 2.*tabs"):
        list(Vcf(path))
    path.write_text("#CHROM POS ID REF ALT\n")
    with pytest.raises(ValueError, match="tabs"):
        Vcf(path)
    path.write_text("#CHROM\tPOS\tID\tREF\tALT\n20\tx\t.\tA\tC\n")
    with pytest.raises(ValueError, match="POS must be"):
        list(Vcf(path))


def test_plain_gzip_and_sites_only(tmp_path):
    text = "#CHROM\tPOS\tID\tREF\tALT\n20\t5\trs1\tA\tC,*\n\n20\t6\t.\tG\t.\n"
    path = tmp_path / "a.vcf.gz"
    path.write_bytes(gzip.compress(text.encode()))
    records = list(Vcf(path))
    assert [(r.start, r.id, r.alts) for r in records] == [(4, "rs1", ("C", "*")), (5, ".", ())]
