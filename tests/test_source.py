"""Where models come from: what is hostile is refused, what is missing is named."""

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from genossm import checkpoint, source

PARITY = Path(__file__).parent / "data" / "parity"


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def folder_with(tmp_path, config=None, **files):
    folder = tmp_path / "model"
    folder.mkdir()
    config = config or json.loads((PARITY / "hyenadna-hf-tiny" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_not_run(tmp_path, zipped):
    mark = tmp_path / "was-run"
    folder = folder_with(tmp_path)
    content = {"state_dict": {"a": Malicious(mark)}}
    if zipped:
        torch.save(content, folder / "weights.ckpt")
    else:
        (folder / "weights.ckpt").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match="could run code"):
        checkpoint.load(folder)
    assert not mark.exists()


def test_a_target_in_a_config_is_refused(tmp_path):
    config = {"genossm_version": "0", "model_type": "hyenadna", "d_model": {"_target_": "os.system", "command": "true"}}
    folder = folder_with(tmp_path, config)
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="_target_"):
        checkpoint.load(folder)


def test_code_that_a_config_asks_for_is_never_run(tmp_path):
    mark = tmp_path / "was-run"
    config = {"model_type": "own", "auto_map": {"AutoModel": "evil.Model"}}
    code = f"open({str(mark)!r}, 'w')".encode()
    folder = folder_with(tmp_path, config, evil__py=code, modeling_hyena__py=code)
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"auto_map\), which is never run"):
        checkpoint.load(folder)
    known = json.loads((PARITY / "hyenadna-hf-tiny" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**known, "auto_map": {"AutoModel": "modeling_hyena.Model"}}))
    (folder / "model.safetensors").write_bytes((PARITY / "hyenadna-hf-tiny" / "model.safetensors").read_bytes())
    checkpoint.load(folder)
    assert not mark.exists()


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    folder = folder_with(tmp_path)
    with zipfile.ZipFile(folder / "weights.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (64 << 20))
    with pytest.raises(ValueError, match="not opened"):
        checkpoint.load(folder)


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/passwd", "..", "a/b.safetensors", 7])
def test_a_shard_outside_the_folder_is_refused(tmp_path, name):
    folder = folder_with(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "evil.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="same folder"):
        checkpoint.load(folder)


def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(tmp_path):
    folder = folder_with(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "evil.safetensors")
    (folder / "one.safetensors").symlink_to("../evil.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    with pytest.raises(ValueError, match=r"is a link to .* must stand in the same folder"):
        checkpoint.load(folder)


def test_shards_make_one_model(tmp_path):
    tensors = source.find(PARITY / "hyenadna-hf-tiny").read_tensors()
    folder, names = folder_with(tmp_path), sorted(tensors)
    parts = {"one.safetensors": names[:9], "two.safetensors": names[9:]}
    for part, inside in parts.items():
        save_file({name: tensors[name] for name in inside}, folder / part)
    weight_map = {name: part for part, inside in parts.items() for name in inside}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    expected = checkpoint.load(PARITY / "hyenadna-hf-tiny").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in checkpoint.load(folder).state_dict().items())


def test_damage_and_absence_are_named(tmp_path):
    folder = folder_with(tmp_path, model__safetensors=b"not safetensors")
    with pytest.raises(ValueError, match="no whole safetensors file"):
        checkpoint.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        checkpoint.load(folder)
    with pytest.raises(FileNotFoundError, match="no folder or file here"):
        checkpoint.load(tmp_path / "nothing" / "here" / "at-all")
    with pytest.raises(ValueError, match="goes with a hub id"):
        checkpoint.load(folder, revision="main")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Yield what puts a model into a hub cache of our own, as the hub's client lays it out; the hub is not asked."""
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(hub_id, case, commit, reference, split=False):
        folder = tmp_path / f"models--{hub_id.replace('/', '--')}"
        snapshot, blobs = folder / "snapshots" / commit, folder / "blobs"
        for made in (snapshot, blobs, folder / "refs"):
            made.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / reference).write_text(commit)
        contents = {name: (PARITY / case / name).read_bytes() for name in ("config.json", "model.safetensors")}
        if split:
            names = dict.fromkeys(source.find(PARITY / case).read_tensors(), "part.safetensors")
            contents["part.safetensors"] = contents.pop("model.safetensors")
            contents["model.safetensors.index.json"] = json.dumps({"weight_map": names}).encode()
        for name, content in contents.items():
            (blobs / f"{commit}-{name}").write_bytes(content)
            (snapshot / name).symlink_to(f"../../blobs/{commit}-{name}")

    return put


def test_revisions_of_the_hub_are_pinned(cache):
    old, new = "1" * 40, "2" * 40
    cache("someone/model", "hyenadna-hf-tiny", old, "v1")
    cache("someone/model", "nt-v1-tiny", new, "main", split=True)
    for source_, revision, family in [
        ("someone/model", None, "nucleotide_transformer"),
        ("someone/model", "v1", "hyenadna"),
        ("someone/model", old, "hyenadna"),
        ("someone/model@v1", None, "hyenadna"),
        (f"someone/model@{new}", None, "nucleotide_transformer"),
    ]:
        assert checkpoint.load(source_, revision=revision).config.model_type == family
    with pytest.raises(FileNotFoundError, match="not in the cache"):
        checkpoint.load("someone/model@v2")


def test_repositories_whose_main_branch_is_wrong_are_pinned(cache):
    cache("togethercomputer/evo-1-8k-base", "nt-v1-tiny", "1" * 40, "main")
    cache("togethercomputer/evo-1-8k-base", "stripedhyena-evo1-tiny", "2" * 40, "1.1_fix")
    assert checkpoint.load("togethercomputer/evo-1-8k-base").config.model_type == "striped_hyena"
    assert checkpoint.load("togethercomputer/evo-1-8k-base@main").config.model_type == "nucleotide_transformer"


def test_offline_the_hub_is_not_asked(cache):
    with pytest.raises(FileNotFoundError, match="not in the cache"):
        checkpoint.load("nobody/nothing-of-this-name@0123abc")


@pytest.mark.parametrize(
    ("case", "file"),
    [
        ("hyenadna-ckpt-lm", "weights.ckpt"),
        ("hyenadna-ckpt-head-pool", "weights.ckpt"),
        ("mamba-ssm-tiny", "pytorch_model.bin"),
        ("mamba2-ssm-tiny", "pytorch_model.bin"),
    ],
)
def test_pickles_hold_what_safetensors_hold(case, file):
    expected = checkpoint.load(PARITY / case).state_dict()
    got = checkpoint.load(PARITY / case / file).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in got.items())


def test_loading_takes_tensors_over_without_a_copy(tmp_path):
    folder = PARITY / "nt-v2-tiny"
    tensors = source.find(folder).read_tensors()
    first = next(iter(tensors.values()))
    files = source.Source("memory", folder / "config.json", folder / "model.safetensors")
    object.__setattr__(files, "read_tensors", lambda device="cpu": tensors)
    from genossm import published

    model = published.read(files).backbone
    pointers = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert first.data_ptr() in pointers or sum(t.data_ptr() in pointers for t in tensors.values()) > len(pointers) / 2
