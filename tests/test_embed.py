import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import genossm
from genossm import checkpoint
from genossm.dna import alphabet
from genossm.dna.tokenizer import tokenizer_named
from genossm.embed import embed
from genossm.models.hyenadna import HyenaDNAConfig
from genossm.models.mamba import MambaConfig
from genossm.models.nucleotide_transformer import NucleotideTransformerConfig
from genossm.models.transformer import TransformerConfig
from genossm.tables import provenance_of


@pytest.fixture(scope="module")
def hyena():
    torch.manual_seed(3)
    return HyenaDNAConfig(d_model=16, n_layer=2, max_length=64).build().eval()


@pytest.fixture(scope="module")
def both_sides():
    torch.manual_seed(3)
    return HyenaDNAConfig(d_model=8, n_layer=1, max_length=64, bidirectional=True).build().eval()


@pytest.fixture(scope="module")
def texts(chr20):
    codes = chr20.codes(next(iter(chr20.contigs)))
    return [alphabet.to_text(codes[1000 * i : 1000 * i + length]) for i, length in enumerate((40, 64, 7, 1, 33, 64))]


@pytest.fixture
def fasta(tmp_path, texts):
    path = tmp_path / "in.fa"
    path.write_text("".join(f">s{i}\n{text}\n" for i, text in enumerate(texts)))
    return path


def states(model, text):
    codes = alphabet.from_text(text)
    with torch.no_grad():
        return model(torch.from_numpy(codes & 0x7F)[None])[0].numpy()


@pytest.mark.parametrize("pooling", ["mean", "max", "first", "last"])
def test_pooling_is_what_it_says_whatever_else_is_in_the_batch(hyena, texts, pooling):
    got = embed(hyena, texts, pooling=pooling).array()
    truth = {"mean": lambda x: x.mean(0), "max": lambda x: x.max(0), "first": lambda x: x[0], "last": lambda x: x[-1]}
    for row, text in zip(got, texts, strict=True):
        np.testing.assert_allclose(row, truth[pooling](states(hyena, text)), atol=1e-5)
    alone = np.concatenate([embed(hyena, [text], pooling=pooling).array() for text in texts])
    np.testing.assert_allclose(got, alone, atol=1e-5)


def test_six_bases_a_token_are_read_by_their_own_tokenizer(texts):
    torch.manual_seed(3)
    shape = {"d_model": 8, "n_layer": 1, "n_head": 2, "d_inner": 16, "vocab_size": 4105, "pad_vocab_size_multiple": 1}
    model = NucleotideTransformerConfig(**shape, tokenizer="nt_v1", positions="absolute").build().eval()
    got = embed(model, texts).array()
    for row, text in zip(got, texts, strict=True):
        ids = torch.from_numpy(tokenizer_named("nt_v1").encode(text))[None]
        with torch.no_grad():
            np.testing.assert_allclose(row, model(ids)[0].mean(0), atol=1e-5)


def test_per_base_and_windows_agree(hyena, texts):
    base = embed(hyena, texts[:1], pooling="base")
    np.testing.assert_allclose(base.array(), states(hyena, texts[0]), atol=1e-5)
    assert base.table.column("start").to_pylist() == list(range(40))
    windows = embed(hyena, texts[:1], window=16)
    assert windows.table.column("end").to_pylist() == [16, 32, 40]
    truth = [base.array()[start : start + 16].mean(0) for start in (0, 16, 32)]
    np.testing.assert_allclose(windows.array(), truth, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "first", "last", "max"])
def test_strands(hyena, texts, pooling):
    other = [alphabet.reverse_complement_text(text) for text in texts]
    forward, reverse = embed(hyena, texts, pooling=pooling).array(), embed(hyena, other, pooling=pooling).array()
    average = embed(hyena, texts, pooling=pooling, strand="average").array()
    concat = embed(hyena, texts, pooling=pooling, strand="concat").array()
    np.testing.assert_allclose(average, (forward + reverse) / 2, atol=1e-5)
    np.testing.assert_allclose(concat, np.concatenate([forward, reverse], 1), atol=1e-5)


def test_per_base_of_the_other_strand_stands_at_its_base(hyena, texts):
    other = states(hyena, alphabet.reverse_complement_text(texts[0]))[::-1]
    concat = embed(hyena, texts[:1], pooling="base", strand="concat").array()
    np.testing.assert_allclose(concat[:, 16:], other, atol=1e-5)


def test_layers_are_the_residual_stream(hyena, texts):
    seen = []
    hooks = [layer.register_forward_hook(lambda m, a, y: seen.append(y.clone())) for layer in hyena.layers]
    states(hyena, texts[0])
    for hook in hooks:
        hook.remove()
    got = embed(hyena, texts[:1], layers=["0", 1, "2", "last"], pooling="base")
    codes = alphabet.from_text(texts[0])
    np.testing.assert_allclose(got.array(0), hyena.embedding.weight.detach().numpy()[codes & 0x7F], atol=1e-6)
    for layer in (1, 2):
        np.testing.assert_allclose(got.array(layer), seen[layer - 1][0].detach(), atol=1e-5)
    np.testing.assert_allclose(got.array("last"), states(hyena, texts[0]), atol=1e-5)


def test_unknown_layers_are_refused_with_a_list(hyena, texts):
    with pytest.raises(ValueError, match="0, 1, 2, last"):
        embed(hyena, texts, layers=["3"])


@pytest.mark.parametrize("strand", ["forward", "concat"])
@pytest.mark.parametrize("name", ["hyena", "both_sides"])
def test_long_sequences_are_tiled_with_overlap(request, chr20, name, strand):
    """A model whose view is shorter than the overlap gives the same on tiles as in one go."""
    model = request.getfixturevalue(name)
    codes = chr20.codes(next(iter(chr20.contigs)))[5000:5064]
    text = alphabet.to_text(codes)
    # Layer 0 sees one base only, so tiling is exact; later layers see all and must differ.
    options = {"pooling": "base", "layers": [0, "last"], "strand": strand}
    whole, tiled = embed(model, [text], **options), embed(model, [text], **options, context=24, overlap=9)
    np.testing.assert_allclose(tiled.array(0), whole.array(0), atol=1e-6)
    assert len(tiled.array("last")) == 64
    assert not np.allclose(tiled.array("last"), whole.array("last"), atol=1e-3)
    if model.causal and strand == "forward":
        # A tile that starts at 0 has the whole context of a causal model.
        np.testing.assert_allclose(tiled.array("last")[:24], whole.array("last")[:24], atol=1e-5)
        third = states(model, text[15:39])
        np.testing.assert_allclose(tiled.array("last")[24:39], third[9:], atol=1e-5)
    windows = embed(model, [text], window=10, layers=[0], context=24, overlap=9, strand=strand).array()
    truth = [whole.array(0)[start : start + 10].mean(0) for start in range(0, 64, 10)]
    np.testing.assert_allclose(windows, truth, atol=1e-5)


def test_files_and_formats(hyena, fasta, texts, tmp_path):
    import anndata
    import zarr

    truth = embed(hyena, texts).array()
    options = {"fasta": fasta}
    table = embed(hyena, out=tmp_path / "e.parquet", **options)
    assert table.table.column("chrom").to_pylist() == [f"s{i}" for i in range(6)]
    np.testing.assert_allclose(table.array(), truth, atol=1e-5)
    said = provenance_of(tmp_path / "e.parquet")
    assert (said["coordinates"], said["pooling"], said["layers"]) == ("0-based half-open", "mean", ["last"])
    assert said["weights"]
    embed(hyena, out=tmp_path / "e.npy", dtype="float16", **options)
    array = np.load(tmp_path / "e.npy")
    assert array.dtype == np.float16
    np.testing.assert_allclose(array, truth, atol=5e-3)
    assert (tmp_path / "e.index.tsv").read_text().splitlines()[1] == "s0\ts0\t0\t40\t+"
    embed(hyena, out=tmp_path / "e.zarr", **options)
    group = zarr.open_group(tmp_path / "e.zarr", mode="r")
    np.testing.assert_allclose(group["embedding"][:], truth, atol=1e-5)
    assert list(group["name"][:]) == [f"s{i}" for i in range(6)]
    embed(hyena, out=tmp_path / "e.h5ad", layers=["last", "0"], **options)
    data = anndata.read_h5ad(tmp_path / "e.h5ad")
    np.testing.assert_allclose(data.X, truth, atol=1e-5)
    assert data.obsm["embedding_0"].shape == (6, 16)
    assert list(data.obs["end"]) == [len(text) for text in texts]


def test_bed_with_strands(hyena, fasta, texts, tmp_path):
    bed = tmp_path / "in.bed"
    bed.write_text("s1\t4\t30\tgene\t0\t-\ns0\t0\t40\n")
    got = embed(hyena, bed=bed, genome=fasta, window=13)
    assert got.table.select(["name", "chrom", "start", "end", "strand"]).to_pylist()[:2] == [
        {"name": "gene", "chrom": "s1", "start": 17, "end": 30, "strand": "-"},
        {"name": "gene", "chrom": "s1", "start": 4, "end": 17, "strand": "-"},
    ]
    truth = states(hyena, alphabet.reverse_complement_text(texts[1][4:30]))
    np.testing.assert_allclose(got.array()[:2], [truth[:13].mean(0), truth[13:].mean(0)], atol=1e-5)


def test_table_keeps_its_columns(hyena, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("name,sequence,label\na,ACGT,1\nb,GGGTT,0\n")
    got = embed(hyena, table=path)
    assert got.table.column("label").to_pylist() == [1, 0]
    path.write_text("name,text\na,ACGT\n")
    with pytest.raises(ValueError, match="no column 'sequence'"):
        embed(hyena, table=path)
    path.write_text("name,sequence\na,ACGT\nb,MKLV\n")
    with pytest.raises(ValueError, match=r"'b'.*no nucleotide"):
        embed(hyena, table=path)


def test_out_of_memory_halves_the_batch(hyena, texts):
    tried = []
    truth = embed(hyena, texts).array()

    def forward(ids_BL, lengths_B=None):
        tried.append(len(ids_BL))
        if len(ids_BL) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return type(hyena).forward(hyena, ids_BL, lengths_B)

    hyena.forward = forward
    try:
        np.testing.assert_allclose(embed(hyena, texts).array(), truth, atol=1e-5)
    finally:
        del hyena.forward
    assert max(tried) == 6
    assert tried[-1] <= 2


def test_recurrent_models_carry_their_state():
    torch.manual_seed(0)
    model = MambaConfig(d_model=16, n_layer=2).build().eval()
    text = "ACGTTGCA" * 40 + "GATTACA"
    whole = embed(model, [text], pooling="base").array()
    for options in ({"context": 50}, {"context": 50, "strand": "concat"}):
        got = embed(model, [text], pooling="base", **options).array()
        np.testing.assert_allclose(got[:, :16], whole, atol=1e-5)
    layers = {"pooling": "base", "layers": [1, 0, "last", 2]}
    whole, carried = embed(model, [text], **layers), embed(model, [text], **layers, context=50)
    for layer in layers["layers"]:
        np.testing.assert_allclose(carried.array(layer), whole.array(layer), atol=1e-5)


def test_a_growing_cache_is_not_carried(texts):
    torch.manual_seed(0)
    model = TransformerConfig(d_model=16, n_layer=1, n_head=2).build().eval()
    got = embed(model, texts[1:2], context=32, overlap=8)
    np.testing.assert_allclose(got.array().shape, (1, 16))


def test_command_line(hyena, fasta, tmp_path, monkeypatch, capsys):
    from genossm import cli

    checkpoint.save(hyena, tmp_path / "model")

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["genossm", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr()

    base = ["embed", "--model", tmp_path / "model", "--fasta", fasta]
    code, said = run(*base, "--out", tmp_path / "e.parquet", "--layers", "0,last", "--json")
    assert code == 0
    assert json.loads(said.out)["complete"]
    assert pq.read_schema(tmp_path / "e.parquet").names[-2:] == ["embedding_0", "embedding_last"]
    protein = tmp_path / "p.fa"
    protein.write_text(">p\nMKLVQQ\n")
    (tmp_path / "foreign.parquet").write_text("x")
    for arguments, message in (
        ([*base, "--out", tmp_path / "foreign.parquet"], "--overwrite"),
        ([*base, "--out", tmp_path / "e.doc"], "must end in one of"),
        ([*base, "--out", tmp_path / "e2.parquet", "--layers", "9"], "layers must be"),
        ([*base, "--out", tmp_path / "e2.parquet", "--pooling", "sum"], "mean, max"),
        ([*base, "--bed", "x", "--out", tmp_path / "e2.parquet"], "Give one of"),
        ([*base[:3], "--fasta", protein, "--out", tmp_path / "e2.parquet"], "no nucleotide"),
        ([*base[:3], "--fasta", tmp_path / "none.fa", "--out", tmp_path / "e2.parquet"], "There is no FASTA file"),
        (["embed", "--model", tmp_path / "no", "--fasta", fasta, "--out", tmp_path / "e2.parquet"], "no"),
    ):
        code, said = run(*arguments)
        assert (code, message in said.err) == (2, True), said.err


def test_verbs_can_be_called_as_functions(hyena, texts):
    assert genossm.embed(hyena, texts[:1]).array().shape == (1, 16)


def test_the_callers_model_comes_back_as_it_was(hyena, texts):
    hyena.train()
    embed(hyena, texts[:1])
    assert hyena.training
    hyena.eval()
