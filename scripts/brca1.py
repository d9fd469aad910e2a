"""BRCA1 variant effects by window: AUROC of loss of function against the rest (Findlay et al. 2018, 3,893 SNVs).

python scripts/brca1.py --model RUN/model --table brca1_sge_findlay2018.tsv.gz --fasta brca1_GRCh38_chr17.fa.gz

The table has columns pos_hg38, ref, alt, class (FUNC, INT, LOF), cadd and phylop; the FASTA is a slice of GRCh38 chr17
that begins at --first (1-based). Every REF is checked. A variant counts as damaging by minus its log-likelihood ratio;
intervals are the middle 95 % of 1,000 bootstraps of the variants. Several models go into one table.
"""

import argparse
import contextlib
import csv
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

import genossm
from genossm.checkpoint import load
from genossm.dna.genome import Genome
from genossm.dna.variant import Variant, ref_problem
from genossm.files import open_text


def main() -> None:
    """Score the table with each model at each window and print AUROCs beside CADD and phyloP."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", required=True, help="folders of models")
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--fasta", type=Path, required=True)
    parser.add_argument("--first", type=int, default=42425000, help="1-based position of the FASTA's first base")
    parser.add_argument("--windows", type=int, nargs="+", default=[1024, 8192, 131072])
    parser.add_argument("--grid", type=int, default=1, help="as of genossm score; 1 centres each window on its variant")
    parser.add_argument("--every", type=int, default=1, help="take every n-th position only")
    parser.add_argument("--strand", default="both")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32", help="bf16 runs under autocast")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON, after each window")
    options = parser.parse_args()
    rows = read_rows(options)
    results: list[dict[str, Any]] = []
    for name in ("cadd", "phylop"):
        known = [row for row in rows if row[name] not in ("", "NA")]
        keep(results, options.out, {"model": name, **auroc(known, [float(row[name]) for row in known])})
    for folder in options.model:
        model = load(folder)
        for window in options.windows:
            if model.max_length is not None and window > model.max_length:
                print(f"{folder}: {window} bp is beyond its context of {model.max_length}")
                continue
            began = time.monotonic()
            damage = [-value for value in scores(model, rows, window, options)]
            found = {"model": folder, "window": window, "seconds": round(time.monotonic() - began, 1)}
            keep(results, options.out, {**found, "precision": options.precision, **auroc(rows, damage)})


def read_rows(options: argparse.Namespace) -> list[dict[str, str]]:
    """Read the table in the order of positions, check every REF, and thin it out where that is asked for."""
    with open_text(options.table) as lines:
        rows = sorted(csv.DictReader(lines, delimiter="\t"), key=lambda row: int(row["pos_hg38"]))
    genome = Genome(options.fasta)
    contig = next(iter(genome.contigs))
    codes = genome.codes(contig)
    agree = [
        ref_problem(Variant(contig, int(row["pos_hg38"]) - options.first, row["ref"], row["alt"]), codes) is None
        for row in rows
    ]
    print(f"REF agrees: {sum(agree)} of {len(rows)}")
    kept = set(sorted({row["pos_hg38"] for row in rows})[:: options.every])
    chosen = [{**row, "contig": contig} for row in rows if row["pos_hg38"] in kept]
    if len({row["class"] == "LOF" for row in chosen}) < 2:
        raise SystemExit(f"--every {options.every} leaves {len(chosen)} variants of one class; take a smaller one.")
    return chosen


def scores(model: Any, rows: list[dict[str, str]], window: int, options: argparse.Namespace) -> list[float]:
    """Return each row's log-likelihood ratio."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    precision = (
        torch.autocast(torch.device(device).type, torch.bfloat16)
        if options.precision == "bf16"
        else contextlib.nullcontext()
    )
    with tempfile.TemporaryDirectory() as folder, precision:
        vcf = Path(folder) / "brca1.vcf"
        records = [
            f"{row['contig']}\t{int(row['pos_hg38']) - options.first + 1}\t.\t{row['ref']}\t{row['alt']}\n"
            for row in rows
        ]
        vcf.write_text("#CHROM\tPOS\tID\tREF\tALT\n" + "".join(records))
        found = genossm.score(
            model, vcf=vcf, genome=options.fasta, window=window, grid=options.grid, strand=options.strand, device=device
        )
    return found.table.column("llr").to_pylist()


def auroc(rows: list[dict[str, str]], damage: list[float]) -> dict[str, Any]:
    """Return the AUROC of LOF against FUNC and INT, its interval and the counts."""
    truth_R, damage_R = np.array([row["class"] == "LOF" for row in rows]), np.array(damage)
    drawn = np.random.default_rng(0).integers(0, len(rows), (1000, len(rows)))
    usable = (chosen_R for chosen_R in drawn if 0 < truth_R[chosen_R].sum() < len(rows))
    repeats = [roc_auc_score(truth_R[chosen_R], damage_R[chosen_R]) for chosen_R in usable]
    return {
        "auroc": round(float(roc_auc_score(truth_R, damage_R)), 4),
        "interval": [round(float(value), 4) for value in np.percentile(repeats, (2.5, 97.5))],
        "variants": len(rows),
        "lof": int(truth_R.sum()),
    }


def keep(results: list[dict[str, Any]], out: Path | None, row: dict[str, Any]) -> None:
    """Print a row and write all so far."""
    results.append(row)
    low, high = row["interval"]
    where = f"{row['model']} {row.get('window', '')}"
    print(f"{where:>40}  AUROC {row['auroc']:.4f} [{low:.4f}, {high:.4f}]  {row}", flush=True)
    if out is not None:
        out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
