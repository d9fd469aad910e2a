"""BRCA1 variant effects by window: AUROC of loss of function against the rest (Findlay et al. 2018, 3,893 SNVs).

python scripts/brca1.py --model RUN/model --table brca1_sge_findlay2018.tsv.gz --fasta brca1_GRCh38_chr17.fa.gz

The table has columns pos_hg38, ref, alt, class (FUNC, INT, LOF), cadd and phylop; the FASTA is a slice of GRCh38 chr17
that begins at --first (1-based). Every REF is checked. A variant counts as damaging by minus its log-likelihood ratio.
"""

import argparse
import csv
import json
import tempfile
import time
from pathlib import Path

from sklearn.metrics import roc_auc_score

import genossm
from genossm.checkpoint import load
from genossm.dna.genome import Genome
from genossm.dna.variant import Variant, ref_problem
from genossm.files import open_text


def main() -> None:
    """Score the table at each window and print AUROCs beside CADD and phyloP."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--fasta", type=Path, required=True)
    parser.add_argument("--first", type=int, default=42425000, help="1-based position of the FASTA's first base")
    parser.add_argument("--windows", type=int, nargs="+", default=[1024, 8192, 131072])
    parser.add_argument("--every", type=int, default=1, help="take every n-th position only")
    parser.add_argument("--strand", default="both")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    options = parser.parse_args()
    with open_text(options.table) as lines:
        rows = list(csv.DictReader(lines, delimiter="\t"))
    genome = Genome(options.fasta)
    contig = next(iter(genome.contigs))
    codes = genome.codes(contig)
    agree = sum(
        ref_problem(Variant(contig, int(row["pos_hg38"]) - options.first, row["ref"], row["alt"]), codes) is None
        for row in rows
    )
    print(f"REF agrees: {agree} of {len(rows)}")
    positions = sorted({int(row["pos_hg38"]) for row in rows})[:: options.every]
    rows = sorted((row for row in rows if int(row["pos_hg38"]) in set(positions)), key=lambda row: int(row["pos_hg38"]))
    truth = [row["class"] == "LOF" for row in rows]
    figures: dict[str, float] = {}
    for name in ("cadd", "phylop"):
        known = [(lof, float(row[name])) for lof, row in zip(truth, rows, strict=True) if row[name] not in ("", "NA")]
        figures[name] = float(roc_auc_score(*zip(*known, strict=True)))
        print(f"{name:>12}  AUROC {figures[name]:.4f}  ({len(known)} variants, {sum(lof for lof, _ in known)} LOF)")
    model = load(options.model)
    with tempfile.TemporaryDirectory() as folder:
        vcf = Path(folder) / "brca1.vcf"
        records = [f"{contig}\t{int(r['pos_hg38']) - options.first + 1}\t.\t{r['ref']}\t{r['alt']}\n" for r in rows]
        vcf.write_text("#CHROM\tPOS\tID\tREF\tALT\n" + "".join(records))
        for window in options.windows:
            if model.max_length is not None and window > model.max_length:
                print(f"{window:>9} bp  beyond the model's context of {model.max_length}")
                continue
            began = time.monotonic()
            scores = genossm.score(
                model, vcf=vcf, genome=options.fasta, window=window, strand=options.strand, device=options.device
            )
            damage = [-value for value in scores.table.column("llr").to_pylist()]
            figures[str(window)] = float(roc_auc_score(truth, damage))
            print(f"{window:>9} bp  AUROC {figures[str(window)]:.4f}  ({time.monotonic() - began:.0f} s)", flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
