import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from genossm import checkpoint
from genossm.dna import alphabet
from genossm.jobs import Job, Progress, Shard, part_size
from genossm.models.hyenadna import HyenaDNAConfig


def run(out, parts=4, shard=None, overwrite=False, identity=None, made=None):
    job = Job(out, identity or {"verb": "test"}, parts, Shard.parse(shard), overwrite)

    def write(part, path):
        if made is not None:
            made.append(part)
        path.write_text(f"{part}\n")

    return job.run(write, lambda paths, path: path.write_text("".join(p.read_text() for p in paths)))


def test_parts_are_joined_in_order_and_cleared(tmp_path):
    out = tmp_path / "deep" / "out.txt"
    assert run(out)
    assert out.read_text() == "0\n1\n2\n3\n"
    assert {p.name for p in out.parent.iterdir()} == {"out.txt", "out.txt.manifest.json"}
    assert json.loads((out.parent / "out.txt.manifest.json").read_text())["identity"]["verb"] == "test"


def test_shards_share_the_parts_and_the_last_one_joins(tmp_path):
    out, made = tmp_path / "out.txt", []
    assert not run(out, parts=5, shard="2/2", made=made)
    assert made == [1, 3]
    assert run(out, parts=5, shard="1/2", made=made)
    assert made == [1, 3, 0, 2, 4]
    assert out.read_text() == "0\n1\n2\n3\n4\n"
    assert run(out, parts=5, shard="2/2", made=made)
    assert len(made) == 5


def test_ranks_of_torchrun_divide_a_shard(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    owned = []
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        shard = Shard.parse("2/3")
        owned += [part for part in range(24) if shard.owns(part)]
    assert len(owned) == len(set(owned)) == 8


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "1/0", "-1/2"])
def test_impossible_shards_are_refused(text):
    with pytest.raises(ValueError, match="1 <= i <= n"):
        Shard.parse(text)


def test_finished_output_is_not_made_again(tmp_path):
    made = []
    run(tmp_path / "out.txt", made=made)
    assert run(tmp_path / "out.txt", made=made)
    assert made == [0, 1, 2, 3]
    run(tmp_path / "out.txt", overwrite=True, made=made)
    assert len(made) == 8


def test_foreign_outputs_and_parts_are_refused(tmp_path):
    out = tmp_path / "out.txt"
    out.write_text("precious")
    with pytest.raises(FileExistsError, match="--overwrite"):
        run(out)
    assert out.read_text() == "precious"
    assert run(out, overwrite=True)
    with pytest.raises(FileExistsError, match="differs in: verb"):
        run(out, identity={"verb": "other"})
    other = tmp_path / "other.txt"
    run(other, shard="1/2")
    with pytest.raises(FileExistsError, match="parts of another job"):
        run(other, shard="1/2", identity={"verb": "other"})
    assert run(other, identity={"verb": "other"}, overwrite=True)


def test_folder_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="can't be written"):
        run(tmp_path / "file" / "out.txt")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_is_named(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(PermissionError, match="can't be written"):
        run(tmp_path / "out.txt")


def _slow(out, log):
    job = Job(out, {"verb": "slow"}, 12)

    def write(part, path):
        with log.open("a") as handle:
            handle.write(f"{part}\n")
        path.write_text(f"half of {part}")
        time.sleep(0.05)
        path.write_text(f"{part}\n")

    job.run(write, lambda paths, path: path.write_text("".join(p.read_text() for p in paths)))


def test_killed_three_times_gives_the_same_file(tmp_path):
    """SIGKILL in the middle, three times: each start redoes at most the part that was cut off."""
    fork = multiprocessing.get_context("fork")
    out, log = tmp_path / "out.txt", tmp_path / "log"
    for already in (1, 4, 8):
        process = fork.Process(target=_slow, args=(out, log))
        process.start()
        while len(list((tmp_path / "out.txt.parts").glob("part-*"))) <= already:
            time.sleep(0.005)
        time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert not out.exists()
    _slow(out, log)
    assert out.read_text() == "".join(f"{part}\n" for part in range(12))
    assert len(log.read_text().split()) <= 12 + 3
    assert {p.name for p in tmp_path.iterdir()} == {"out.txt", "out.txt.manifest.json", "log"}


def test_verbs_killed_three_times_or_run_by_two_ranks_give_the_same_bytes(chr20, tmp_path):
    """embed, score and ism through the whole of what they do; see killed.py."""
    torch.manual_seed(3)
    checkpoint.save(HyenaDNAConfig(d_model=16, n_layer=2, max_length=64).build(), tmp_path / "model")
    text = alphabet.to_text(chr20.codes(next(iter(chr20.contigs)))[5000:11000]).upper()
    (tmp_path / "g.fa").write_text(f">c\n{text}\n")
    snvs = [f"c\t{at + 1}\t.\t{text[at]}\t{'CGTA'['ACGT'.index(text[at])]}\n" for at in range(100, 5900, 97)]
    (tmp_path / "v.vcf").write_text("#CHROM\tPOS\tID\tREF\tALT\n" + "".join(snvs))
    (tmp_path / "r.bed").write_text("c\t3000\t3060\nc\t1000\t1050\tx\t0\t-\n")
    script = Path(__file__).with_name("killed.py")
    ran = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr[-3000:]
    for name in ("embed-{}.parquet", "score-{}.vcf.gz", "ism-{}.bedgraph"):
        whole, killed, ranks = ((tmp_path / name.format(kind)).read_bytes() for kind in ("whole", "killed", "ranks"))
        assert whole == killed == ranks
    assert not list(tmp_path.glob("*.parts"))


def test_progress_shows_itself_after_two_seconds_with_the_time_left(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Progress("embedding", 1000, "bp") as bar:
        bar.advance(10)
        clock[0] += 20
        bar.advance(240)
    assert capsys.readouterr().err == "embedding: 250/1,000 bp, 60 s left\n"


@pytest.mark.parametrize("total", [2048, 100_000, 3001, 600])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_processes_get_equally_much_to_do(total, ranks):
    size = part_size(total, 256, 32)
    parts = [min(size, total - first) for first in range(0, total, size)]
    assert max(parts) <= 256
    assert max(sum(parts[rank::ranks]) for rank in range(ranks)) <= 1.05 * total / ranks


@pytest.mark.parametrize(("total", "most", "size"), [(40, 256, 32), (40, 2, 2), (0, 256, 32)])
def test_little_work_makes_few_parts(total, most, size):
    assert part_size(total, most, 32) == size
