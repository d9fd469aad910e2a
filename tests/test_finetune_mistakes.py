"""What users get wrong in fine-tuning ends on the command line with one message and exit code 2."""

import logging
import re
import sys

import pytest

from genossm import cli

SMALL = ["model.d_model=8", "model.n_layer=1", "model.max_length=32", "epochs=1", "trainer.accelerator=cpu"]
GOOD = "sequence,label,split\n" + "".join(
    f"{'GC' * 8 if i % 2 else 'AT' * 8},{i % 2},{('train', 'val', 'test')[i // 4 % 3]}\n" for i in range(24)
)


def refused(capsys, monkeypatch, *words):
    """Run a command that has to fail; return the message, in one line."""
    monkeypatch.setattr(sys, "argv", ["genossm", *words])
    # The handler of an earlier test writes to the stderr that was caught there.
    monkeypatch.setattr(logging.getLogger("genossm"), "handlers", [])
    with pytest.raises(SystemExit) as ended:
        sys.exit(cli.main())
    error = capsys.readouterr().err
    assert ended.value.code == 2, error
    assert "Traceback" not in error
    return " ".join(error[error.index("error: ") :].split())


TABLES = {
    "one class": (GOOD.replace(",0,", ",1,"), [], r"every label is '1'; a classifier needs at least two classes"),
    "missing label": (GOOD.replace(",0,train", ",,train", 1), [], r"1 of 24 rows have no label in 'label'"),
    "NaN label": (GOOD.replace(",0,train", ",NaN,train", 1), [], r"1 of 24 rows have no label in 'label'"),
    "class that train lacks": (GOOD.replace(",0,test", ",2,test"), [], r"class 2 is in test but not in train"),
    "words where numbers are": (GOOD.replace(",0,", ",low,"), ["data.kind=regression"], r"label 'low' is not a finite"),
    "empty sequence": (GOOD.replace("AT" * 8, "", 1), [], r"row 0: the sequence has length 0"),
    "too long": (
        GOOD.replace("AT" * 8, "AT" * 20, 1),
        [],
        r"has 40 bp; the model takes at most 32.*loader.crop=center",
    ),
    "no nucleotide": (GOOD.replace("AT" * 8, "AT!T", 1), [], r"'!' at position 2 is no nucleotide"),
    "unknown column": (GOOD, ["data.label=klass"], r"no column 'klass'; it has sequence, label, split"),
    "unknown kind": (GOOD, ["data.kind=ranking"], r"kind must be one of binary, multiclass"),
    "unknown way": (GOOD, ["finetune=half"], r"finetune must be one of full, head, lora"),
    "unknown key": (GOOD, ["supervised.layer_decy=0.9"], r"supervised.*layer_decy"),
    "unknown pretrained": (GOOD, ["model.pretrained=nowhere"], r"nowhere"),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_that_is_wrong(case, capsys, monkeypatch, tmp_path):
    text, overrides, message = TABLES[case]
    table = tmp_path / "my.csv"
    table.write_text(text)
    words = ["train", "experiment=finetune", f"data.table={table}", f"output={tmp_path}", *SMALL, *overrides]
    assert re.search(message, refused(capsys, monkeypatch, *words))


def test_longer_than_the_context_goes_where_cropping_is_asked_for(monkeypatch, tmp_path):
    table = tmp_path / "my.csv"
    table.write_text(GOOD.replace("AT" * 8, "AT" * 20, 1))
    words = ["train", "experiment=finetune", f"data.table={table}", f"output={tmp_path}", *SMALL, "loader.crop=center"]
    monkeypatch.setattr(sys, "argv", ["genossm", *words, "quiet=true"])
    cli.main()
    assert list(tmp_path.glob("finetune/*/finished"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=genomic_benchmarks", "data.task=human_enhancers"], "'human_enhancers'; there are: demo_coding"),
        (["data=genomic_benchmarks", "data.providers=[mirror]"], "mirror"),
        (["data=nucleotide_transformer", "data.task=H5"], "no revised task 'H5'; there are: "),
        (["data=gue", "data.task=H5"], "no task 'H5'; there are: "),
        (["data=genomic_benchmark"], "Did you mean 'genomic_benchmarks'"),
    ],
)
def test_unknown_tasks_and_providers_say_what_there_is(words, message, capsys, monkeypatch):
    assert message in refused(capsys, monkeypatch, "train", "experiment=finetune", *words)
