"""Tables on disk: parts as Parquet, joined block by block into Parquet, TSV, .npy, Zarr or AnnData."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genossm.files import write_atomically
from genossm.ops.backend import installed

METADATA = b"genossm"
"""Key of the schema's metadata under which a table's provenance stands, as JSON."""

VECTOR_FORMATS = (".parquet", ".npy", ".zarr", ".h5ad")
TABLE_FORMATS = (".parquet", ".tsv")


def check_format(out: str | Path, allowed: Sequence[str]) -> str:
    """Return the ending of an output's name.

    Raises:
        ValueError: no such format, or the package that writes it is not installed.
    """
    name = Path(out).name.lower()
    ending = next((ending for ending in sorted(allowed, key=len, reverse=True) if name.endswith(ending)), None)
    if ending is None:
        raise ValueError(f"out must end in one of {', '.join(allowed)}; got {str(out)!r}.")
    needs = {".zarr": "zarr", ".h5ad": "anndata"}.get(ending)
    if needs is not None and not installed(needs):
        raise ValueError(f"Writing {ending} needs the package {needs}: pip install 'genossm[export]'.")
    return ending


def vectors(values_RD: Any, dtype: str) -> pa.FixedSizeListArray:
    """Return the rows of a matrix as a column of fixed-size lists of float16 or float32."""
    flat = np.ascontiguousarray(values_RD, dtype=dtype)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])


def with_provenance(schema: pa.Schema, provenance: Mapping[str, Any]) -> pa.Schema:
    """Return a schema that says where its table comes from."""
    return schema.with_metadata({METADATA: json.dumps(provenance, default=str).encode()})


def provenance_of(path: str | Path) -> dict[str, Any]:
    """Return what a Parquet file says about where it comes from; empty where it says nothing."""
    metadata = pq.read_schema(path).metadata or {}
    return json.loads(metadata.get(METADATA, b"{}"))


def write_part(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write batches as they come, so that a part is never whole in memory."""
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
        for batch in batches:
            writer.write_batch(batch)


def read_blocks(paths: Sequence[Path], rows: int = 4096) -> Iterator[pa.RecordBatch]:
    """Yield the rows of Parquet files in order, a few at a time."""
    for path in paths:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(rows)


def join(paths: Sequence[Path], out: Path, ending: str, index: Path | None = None) -> None:
    """Join parts into one output.

    Args:
        paths: Parquet files of one schema, at least one.
        out: the file, or folder for Zarr.
        ending: its format.
        index: for .npy: where the other columns go, as TSV.

    Raises:
        ValueError: .npy was asked for several columns of vectors.
    """
    schema = pq.read_schema(paths[0])
    rows = sum(pq.read_metadata(path).num_rows for path in paths)
    if ending == ".parquet":
        _join_parquet(paths, out, schema)
    elif ending == ".tsv":
        _join_tsv(paths, out, schema)
    elif ending == ".npy":
        _join_npy(paths, out, schema, rows, index)
    elif ending == ".zarr":
        _join_zarr(paths, out, schema, rows)
    else:
        _join_anndata(paths, out, schema, rows)


def vector_columns(schema: pa.Schema) -> list[str]:
    """Return the names of the columns that hold vectors."""
    return [field.name for field in schema if pa.types.is_fixed_size_list(field.type)]


def matrix(column: Any) -> Any:
    """Return a column of fixed-size lists as a matrix."""
    if isinstance(column, pa.ChunkedArray):
        return np.concatenate([matrix(chunk) for chunk in column.chunks]) if column.num_chunks else np.zeros((0, 0))
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)


def _join_parquet(paths: Sequence[Path], out: Path, schema: pa.Schema) -> None:
    with pq.ParquetWriter(out, schema, compression="zstd", use_dictionary=False) as writer:
        for path in paths:
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    writer.write_table(file.read_row_group(group))


def _join_tsv(paths: Sequence[Path], out: Path, schema: pa.Schema) -> None:
    with out.open("w", encoding="utf-8") as handle:
        handle.write("\t".join(schema.names) + "\n")
        for block in read_blocks(paths):
            for row in zip(*(column.to_pylist() for column in block.columns), strict=True):
                handle.write("\t".join(_cell(value) for value in row) + "\n")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _join_npy(paths: Sequence[Path], out: Path, schema: pa.Schema, rows: int, index: Path | None) -> None:
    names = vector_columns(schema)
    if len(names) != 1:
        raise ValueError(f"A .npy file holds one layer; there are {len(names)}. Use .parquet, .zarr or .h5ad.")
    kind = schema.field(names[0]).type
    dtype = np.dtype("float16" if pa.types.is_float16(kind.value_type) else "float32")
    with out.open("wb") as handle:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows, kind.list_size)}
        np.lib.format.write_array_header_1_0(handle, header)
        for block in read_blocks(paths):
            handle.write(np.ascontiguousarray(matrix(block.column(names[0]))).data)
    if index is not None:
        others = [name for name in schema.names if name not in names]

        def write(path: Path) -> None:
            with path.open("w", encoding="utf-8") as handle:
                handle.write("\t".join(others) + "\n")
                for block in read_blocks(paths):
                    for row in zip(*(block.column(name).to_pylist() for name in others), strict=True):
                        handle.write("\t".join(_cell(value) for value in row) + "\n")

        write_atomically(index, write)


def _join_zarr(paths: Sequence[Path], out: Path, schema: pa.Schema, rows: int) -> None:
    import zarr

    group = zarr.open_group(out, mode="w", attributes={"genossm": _provenance(schema)})
    names = vector_columns(schema)
    arrays = {}
    for field in schema:
        if field.name in names:
            dtype = "float16" if pa.types.is_float16(field.type.value_type) else "float32"
            shape, chunks = (rows, field.type.list_size), (min(4096, max(1, rows)), field.type.list_size)
            arrays[field.name] = group.create_array(field.name, shape=shape, chunks=chunks, dtype=dtype)
        else:
            kind = str if pa.types.is_string(field.type) else field.type.to_pandas_dtype()
            arrays[field.name] = group.create_array(field.name, shape=(rows,), chunks=(max(1, rows),), dtype=kind)
    text: dict[str, list[Any]] = {name: [] for name in schema.names if name not in names}
    at = 0
    for block in read_blocks(paths):
        for name in names:
            arrays[name][at : at + block.num_rows] = matrix(block.column(name))
        for name, values in text.items():
            values.extend(block.column(name).to_pylist())
        at += block.num_rows
    for name, values in text.items():
        strings = pa.types.is_string(schema.field(name).type)
        arrays[name][:] = np.array(["" if v is None else v for v in values], dtype=object if strings else None)


def _join_anndata(paths: Sequence[Path], out: Path, schema: pa.Schema, rows: int) -> None:
    import anndata
    import h5py
    import pandas as pd

    names = vector_columns(schema)
    width = schema.field(names[0]).type.list_size
    others = [name for name in schema.names if name not in names]
    columns: dict[str, list[Any]] = {name: [] for name in others}
    for block in read_blocks(paths):
        for name in others:
            columns[name].extend(block.column(name).to_pylist())
    table = anndata.AnnData(
        obs=pd.DataFrame(columns, index=[str(row) for row in range(rows)]),
        var=pd.DataFrame(index=[str(column) for column in range(width)]),
        uns={"genossm": json.dumps(_provenance(schema))},
    )
    table.write_h5ad(out)
    # The matrices are written block by block, so that they need not fit into memory.
    with h5py.File(out, "r+") as file:
        where = {name: "X" if name == names[0] else f"obsm/{name}" for name in names}
        if "X" in file:
            del file["X"]
        for name in names:
            kind = schema.field(name).type
            dtype = "float16" if pa.types.is_float16(kind.value_type) else "float32"
            data = file.create_dataset(where[name], shape=(rows, kind.list_size), dtype=dtype)
            data.attrs["encoding-type"], data.attrs["encoding-version"] = "array", "0.2.0"
        at = 0
        for block in read_blocks(paths):
            for name in names:
                file[where[name]][at : at + block.num_rows] = matrix(block.column(name))
            at += block.num_rows


def _provenance(schema: pa.Schema) -> dict[str, Any]:
    return json.loads((schema.metadata or {}).get(METADATA, b"{}"))


def substitution_matrix(table: pa.Table, region: int = 0, column: str = "llr") -> Any:
    """Return the effects of a region as (4, L), bases in the order A, C, G, T; 0 at the reference base.

    Args:
        table: the rows of an in-silico mutagenesis.
        region: number of the region.
        column: the effect.

    Raises:
        KeyError: there is no such column.
        ValueError: there is no such region.
    """
    if column not in table.column_names:
        raise KeyError(f"There is no column {column!r}; there are: {', '.join(table.column_names)}.")
    rows = [row for row in table.to_pylist() if row["region"] == region]
    if not rows:
        raise ValueError(f"There is no region {region}.")
    first, last = (choose(row["position"] for row in rows) for choose in (min, max))
    values = np.zeros((4, last - first + 1))
    for row in rows:
        at = last - row["position"] if row["strand"] == "-" else row["position"] - first
        values["ACGT".index(row["alt"]), at] = row[column]
    return values
