import gzip
import os

import pytest

from genossm.dna import alphabet
from genossm.dna.genome import Genome
from genossm.dna.interval import Interval


def write(path, text):
    path.write_text(text)
    return path


def test_reads_what_stands_in_the_file(tmp_path):
    fasta = write(tmp_path / "a.fa", ">one first\nACGT\r\nacgtn\n\n>two/2\nRYN\nAAAACCCC\n")
    genome = Genome(fasta)
    assert genome.contigs == {"one": 9, "two/2": 11}
    assert alphabet.to_text(genome.fetch(Interval("one", 0, 9))) == "ACGTacgtn"
    assert alphabet.to_text(genome.fetch(Interval("two/2", 0, 5))) == "NNNAA"
    assert alphabet.to_text(genome.fetch(Interval("one", 1, 4, "-"))) == "ACG"


def test_is_encoded_again_when_the_file_changes(tmp_path):
    fasta = write(tmp_path / "a.fa", ">one\nACGT\n")
    assert Genome(fasta).contigs == {"one": 4}
    write(fasta, ">one\nACGTACGT\n")
    assert Genome(fasta).contigs == {"one": 8}


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o600, 0o444])
def test_whoever_may_read_the_fasta_may_read_the_store(tmp_path, mode):
    path = tmp_path / "a.fa"
    path.write_text(">a/b\nACGT\n>../c\nAC\n")
    path.chmod(mode)
    assert Genome(path).contigs == {"a/b": 4, "../c": 2}
    assert (tmp_path / "a.fa.tokens").stat().st_mode & 0o777 == mode | 0o600
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.fa", "a.fa.tokens"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("ACGT\n>a\nACGT\n", "not with a header"),
        (">a\nACGT\n>a\nACGT\n", "appears twice"),
        (">a\nMKLVEFPQ\n", "is no nucleotide"),
        (">a\n>b\nACGT\n", "'a' is empty"),
        (">\nACGT\n", "no printable name"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        Genome(write(tmp_path / "a.fa", text))
    assert list(tmp_path.iterdir()) == [tmp_path / "a.fa"]


def test_bundled_genome(chr20):
    assert chr20.contigs == {"chr20_33260000_34308576": 2**20}
    chr20.verify()


def test_gzip_is_read(tmp_path):
    path = tmp_path / "a.fa.gz"
    path.write_bytes(gzip.compress(b">20\nACGTTT\n"))
    assert alphabet.to_text(Genome(path).fetch(Interval("chr20", 2, 6))) == "GTTT"
