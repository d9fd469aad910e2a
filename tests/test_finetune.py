"""Fine-tuning from the table to the reloaded model."""

import csv
import json

import pytest
import torch

from genossm import adapters, checkpoint
from genossm.data.sequences import Encoded, SequenceBatches
from genossm.data.table import Table
from genossm.dna.tokenizer import CharTokenizer, KmerTokenizer
from genossm.finetune import finetune
from genossm.models.base import config_from_dict
from genossm.train import compose, train

TINY = ["model.d_model=16", "model.n_layer=1", "model.max_length=64", "epochs=2", "batch_size=12", "quiet=true"]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return Table.tiny(tmp_path_factory.mktemp("table"))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    torch.manual_seed(0)
    model = config_from_dict({"model_type": "hyenadna", "d_model": 16, "n_layer": 1, "max_length": 64}).build()
    return checkpoint.save(model, tmp_path_factory.mktemp("pretrained") / "model")


def options(tmp_path, *more):
    return [*TINY, f"output={tmp_path}", "trainer.accelerator=cpu", *more]


def predictions(result):
    with (result.folder / "predictions.csv").open() as handle:
        return list(csv.DictReader(handle))


def answers(model, table):
    data = table.load()
    batches = SequenceBatches(Encoded(data.splits["test"], data.target), CharTokenizer(), 64, None)
    batch = batches[0]
    with torch.no_grad():
        outputs = model(batch["ids_BL"], batch["lengths_B"]).softmax(-1)
    return outputs[torch.argsort(torch.from_numpy(batches.numbers(0)))]


@pytest.mark.parametrize("way", ["full", "head", "lora"])
def test_what_is_reloaded_predicts_what_was_measured(way, table, pretrained, tmp_path):
    if way == "lora":
        pytest.importorskip("peft", reason="the extra peft is not installed")
    result = finetune(table, pretrained, options(tmp_path, f"finetune={way}"))
    rows = predictions(result)
    measured = torch.tensor([[float(row["0"]), float(row["1"])] for row in rows])
    reloaded = checkpoint.load_classifier(result.folder / "model")
    torch.testing.assert_close(answers(reloaded, table), measured, atol=1e-5, rtol=1e-4)
    guessed = [str(int(p[1] > p[0])) == row["target"] for p, row in zip(measured, rows, strict=True)]
    assert sum(guessed) / len(rows) == pytest.approx(result.metrics["test/accuracy"])
    assert reloaded.head.config.names == ("0", "1")
    before, after = checkpoint.load(pretrained).state_dict(), reloaded.backbone.state_dict()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert bool(moved) == (way != "head")
    if way == "lora":
        again = adapters.load_adapters(checkpoint.load(pretrained), result.folder / "adapter")
        torch.testing.assert_close(answers(again, table), measured, atol=1e-5, rtol=1e-4)


def test_command_line_config_and_result_file(table, tmp_path):
    config = compose(["experiment=finetune", f"data.table='{table.table}'", *options(tmp_path)])
    result = train(config)
    values = json.loads((result.folder / "result.json").read_text())
    assert values["protocol"] == "given"
    assert values["rows"] == {"train": 36, "val": 12, "test": 12}
    assert values["metrics"] == result.metrics
    assert {p.name for p in result.folder.iterdir()} >= {"config.yaml", "metrics.csv", "predictions.csv", "model"}


def test_best_epoch_is_the_one_that_is_kept(table, tmp_path):
    result = finetune(table, None, options(tmp_path, "epochs=4", "optim.lr=0.03"))
    with (result.folder / "metrics.csv").open() as handle:
        seen = [float(row["val/accuracy"]) for row in csv.DictReader(handle) if row["val/accuracy"]]
    assert result.metrics["val/accuracy"] == pytest.approx(max(seen))


def test_loss_chooses_the_epoch_and_the_default_metric_has_the_interval(table, tmp_path, capsys):
    result = finetune(table, None, options(tmp_path, "monitor=loss", "quiet=false"))
    assert result.monitor == "val/loss"
    assert result.interval[0] <= result.metrics["test/accuracy"] <= result.interval[1]
    assert "[" in next(
        line for line in capsys.readouterr().out.splitlines() if line.strip(" │┃").startswith("accuracy")
    )


def test_resumed_run_equals_an_uninterrupted_one(table, tmp_path):
    steps = options(tmp_path / "a", "save_every=1", "epochs=4")
    whole = finetune(table, None, steps)
    halved = finetune(table, None, [*options(tmp_path / "b", "save_every=1", "epochs=4"), "name=cut"])
    folder = halved.folder
    (folder / "finished").unlink()
    (folder / "checkpoints" / "last.ckpt").unlink()
    again = finetune(table, None, [*options(tmp_path / "b", "save_every=1", "epochs=4"), "name=cut", "resume=auto"])
    assert again.folder == folder
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def test_data_frame_and_early_stopping(tmp_path):
    import pandas as pd

    rows = [("GGCC" * 4 if i % 2 else "AATT" * 4, 0.5 + i % 2) for i in range(40)]
    frame = pd.DataFrame(rows, columns=["sequence", "label"])
    result = finetune(frame, None, options(tmp_path, "patience=1", "epochs=8", "optim.lr=0.01"))
    assert {"test/pearson", "test/mse"} <= set(result.metrics)
    reloaded = checkpoint.load_classifier(result.folder / "model")
    ids = torch.from_numpy(CharTokenizer().encode("GGCC" * 4).copy())[None]
    assert abs(float(reloaded(ids).detach()) - 1.5) < 0.7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dedup=some", "dedup must be one of"),
        ("finetune=half", "finetune must be one of full, head, lora"),
        ("protocol=cv", "protocol must be auto or one of"),
        ("monitor=pearson", "no metric 'pearson'; there are: .*accuracy"),
        ("model.max_length=8", "the model takes at most 8"),
        ("head.pooling=none", "answers each base"),
        ("supervised.class_weights=even", "class_weights must be null, balanced"),
    ],
)
def test_mistakes_are_named(override, message, table, tmp_path):
    with pytest.raises((ValueError, KeyError), match=message):
        finetune(table, None, options(tmp_path, override))


def test_model_of_another_alphabet_reads_its_own_tokens(table, tmp_path):
    torch.manual_seed(0)
    values = {"model_type": "nucleotide_transformer", "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32}
    values |= {"vocab_size": 4105, "tokenizer": "nt_v1"}
    pretrained = checkpoint.save(config_from_dict(values).build(), tmp_path / "nt")
    overrides = [option for option in options(tmp_path, "epochs=1") if not option.startswith("model.")]
    result = finetune(table, pretrained, overrides)
    ids = SequenceBatches(Encoded(table.load().splits["test"], table.load().target), KmerTokenizer(), 4, None)[0]
    assert result.model.backbone.config.tokenizer == "nt_v1"
    assert ids["ids_BL"].shape[1] < max(len(row.sequence) for row in table.load().splits["test"])
    with torch.no_grad():
        assert torch.isfinite(result.model(ids["ids_BL"], ids.get("lengths_B"))).all()
