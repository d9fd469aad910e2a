"""Bad input through the real command line: one message, exit code 2, nothing half-written, nothing of before lost."""

import gzip
from pathlib import Path

import pytest

DNA = "ACGTTGCAAC" * 30


def fasta(folder, name="a.fa", text=f">one\n{DNA}\n>two\n{DNA}\n"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def bed(folder, text):
    fasta(folder)
    (folder / "a.bed").write_text(text)
    return ["data.fasta=a.fa", "data.bed=a.bed"]


def no_folder_to_write(folder):
    # A file where the cache folder should be: root may write to a read-only folder, but not into a file.
    fasta(folder)
    (folder / "cache").write_text("")
    return ["data.fasta=a.fa", "data.cache=cache"]


def gzip_bomb(folder):
    with gzip.open(folder / "a.fa", "wb", compresslevel=9) as handle:
        handle.write(b">one\n")
        for _ in range(20):
            handle.write(b"A" * (1 << 24))
    return ["data.fasta=a.fa"]


CASES = {
    "missing": (lambda _: ["data.fasta=a.fa"], "There is no FASTA file 'a.fa'."),
    "empty": (lambda f: [f"data.fasta={fasta(f, text='').name}"], "a.fa is empty"),
    "binary": (lambda f: [f"data.fasta={fasta(f, text=bytes(range(256)) * 9).name}"], "not with a header line"),
    "damaged gzip": (
        lambda f: [f"data.fasta={fasta(f, text=gzip.compress(b'>one' + DNA.encode())[:-9]).name}"],
        "damaged gzip file",
    ),
    "sequence before a header": (
        lambda f: [f"data.fasta={fasta(f, text='ACGT' + chr(10) + '>a' + chr(10) + DNA).name}"],
        "starts with b'ACGT",
    ),
    "a contig twice": (
        lambda f: [f"data.fasta={fasta(f, text=f'>a{chr(10)}{DNA}{chr(10)}>a{chr(10)}{DNA}').name}"],
        "contig 'a' appears twice; names must be unique",
    ),
    "a contig in two files": (
        lambda f: [f"data.fasta=[{fasta(f).name},{fasta(f, 'b.fa').name}]"],
        "Contig 'one' is in a.fa and in b.fa",
    ),
    "protein": (
        lambda f: [f"data.fasta={fasta(f, text='>p' + chr(10) + 'MKLVEFPQ' * 40).name}"],
        "is no nucleotide (IUPAC letters are allowed, in either case). Is it a protein",
    ),
    "a control character in a name": (
        lambda f: [f"data.fasta={fasta(f, text='>a' + chr(27) + '[31m' + chr(10) + DNA).name}"],
        r"the header b'a\x1b[31m' has no printable name",
    ),
    "gzip bomb": (gzip_bomb, "unpacks to more than"),
    "an interval outside its contig": (
        lambda f: bed(f, "one\t0\t200\ttrain\none\t200\t301\tvalid\n"),
        "a.bed, line 2: one:200-301 reaches beyond its contig of 300 bp. Is it from another assembly?",
    ),
    "one column": (lambda f: bed(f, "one\n"), "a.bed, line 1: a BED line needs at least chrom, start and end"),
    "an end before its start": (lambda f: bed(f, "one\t9\t5\n"), "a.bed, line 1: An interval needs 0 <= start < end"),
    "no contig in common": (
        lambda f: bed(f, "chr7\t0\t9\ttrain\nchr7\t9\t20\ttrain\nchr8\t0\t9\tvalid\n"),
        "None of the contigs of a.bed (chr7, 2 intervals; chr8, 1 interval) is in the genome, which has: one, two.",
    ),
    "an unknown split": (lambda f: bed(f, "one\t0\t90\ttrain\none\t90\t99\tblah\n"), "a split is train, val or test"),
    "a base in two splits": (
        lambda f: bed(f, "one\t0\t200\ttrain\none\t100\t300\tvalid\n"),
        "train one:0-200 meets val one:100-300",
    ),
    "a window that reaches into another split": (
        lambda f: [*bed(f, "one\t0\t100\ttrain\none\t100\t120\tvalid\n"), "length=64"],
        "A window of 65 bp could reach from one split into another: train one:0-100 meets val one:",
    ),
    "longer than every contig": (
        lambda f: [f"data.fasta={fasta(f).name}", "length=1000"],
        "A window of 1001 bp is longer than every contig (the longest has 300 bp).",
    ),
    "N alone": (
        lambda f: [f"data.fasta={fasta(f, text='>one' + chr(10) + 'N' * 9000).name}"],
        "windows of 33 bp in a row held more than 50% N",
    ),
    "a cache that is no folder": (no_folder_to_write, "can be written nowhere: cache (File exists)"),
    "full disk": (
        lambda f: [f"data.fasta={fasta(f, text='>one' + chr(10) + DNA * 30).name}", "limit=4096"],
        "The encoded form of a.fa could not be written",
    ),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory, run_trainings):
    """Every case run by the command line: exit code, and the files before."""
    root = tmp_path_factory.mktemp("bad")
    jobs, before = [], []
    for name, (make, _) in CASES.items():
        folder = root / name.replace(" ", "_")
        folder.mkdir()
        common = ["model.d_model=16", "model.n_layer=1", "length=32", "batch_size=2", "trainer.accelerator=cpu"]
        jobs.append([str(folder), *common, "trainer.max_steps=1", "data.reverse_complement=false", *make(folder)])
        before.append(sorted(path.name for path in folder.iterdir()))
    statuses = run_trainings(jobs)
    results = zip(CASES, statuses, jobs, before, strict=True)
    return {name: (status, Path(job[0]), files) for name, status, job, files in results}


@pytest.mark.parametrize("name", CASES)
def test_ends_with_one_message_and_leaves_nothing(ended, name):
    (status,), folder, before = ended[name]
    text = (folder / "stderr.txt").read_text()
    assert status == 2, text
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, text
    assert CASES[name][1] in errors[0]
    assert "Traceback" not in text
    # N alone is found out by the first step, whose row of the table stays; other runs leave no folder.
    kept = {path.name for path in folder.iterdir()} - {"stderr.txt", *(["outputs"] if name == "N alone" else [])}
    assert kept - {f"{path}.tokens" for path in before} == set(before), "something half-written was left"
    if name in ("missing", "empty", "binary", "protein", "gzip bomb", "full disk", "damaged gzip"):
        assert kept == set(before)


def test_contigs_that_the_genome_lacks_are_counted_and_named(tmp_path, caplog):
    from genossm.data.windows import read_splits
    from genossm.dna.genome import Genome

    bed(tmp_path, "chr9\t0\t9\ttrain\nchr9\t9\t12\ttrain\ntwo\t0\t90\ttrain\none\t0\t90\tvalid\n")
    splits = read_splits(Genome(tmp_path / "a.fa"), tmp_path / "a.bed")
    assert [interval.chrom for interval in splits["train"]] == ["two"]
    assert "1 contigs are not in the genome, left out: chr9 (2)" in caplog.text


def test_an_unsorted_bed_is_as_good_as_a_sorted_one(tmp_path):
    from genossm.data.windows import fit_windows, read_splits
    from genossm.dna.genome import Genome

    rows = ["two\t0\t90\ttrain", "one\t100\t190\tvalid", "one\t0\t90\ttrain", "two\t200\t290\ttest"]
    found = []
    for number, order in enumerate((rows, sorted(rows))):
        bed(tmp_path, "\n".join(order))
        genome = Genome(tmp_path / "a.fa")
        found.append(fit_windows(read_splits(genome, tmp_path / "a.bed"), 32, genome))
        assert number or found
    assert found[0] == found[1]
