"""Write the folder map of README.md anew, one line a file, from what each file says of itself first.

Usage: python scripts/map.py          (rewrites the block between README.md's map fences)
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
OPENING, CLOSING = "<!-- map: python scripts/map.py -->", "<!-- end of map -->"
ROOMS = {
    "": "verbs, and what they share",
    "models": "backbones",
    "tasks": "head, loss, metrics",
    "data": "data sets",
    "nn": "layers",
    "ops": "operations",
    "ops/kernels": "their compiled bodies",
    "dna": "letters, intervals, genomes",
    "layouts": "published checkpoints",
    "benchmarks": "what `genossm bench` measures",
}
ELSEWHERE = """
conf/                    one YAML a choice: model/ data/ task/ optim/ callbacks/ trainer/ logger/ experiment/
scripts/                 chores: this map
data/README.md           each data set's source, terms and the command that fetches it
docs/                    architecture.md naming.md extending.md results.md
tests/                   mirrors genossm/, and contract/ for what every backbone, data set and task promises
"""


def first_sentence(path: Path) -> str:
    """Return the first line of a module's docstring, without its full stop."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return text.partition("\n")[0].removesuffix(".")


def draw() -> str:
    """Return the map as a fenced block."""
    package = ROOT / "genossm"
    folders = sorted({path.parent.relative_to(package).as_posix() for path in package.rglob("*.py")})
    known = [room for room in ROOMS if (room or ".") in folders]
    unknown = [folder for folder in folders if folder != "." and folder not in ROOMS]
    lines: list[str] = []
    for room in [*known, *unknown]:
        folder = package / room
        modules = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
        if modules:
            lines.append(f"{f'genossm/{room}'.rstrip('/') + '/':<24} {ROOMS.get(room, '')}".rstrip())
            lines += [f"  {path.name:<22} {first_sentence(path)}" for path in modules]
    return "\n".join([OPENING, "```", *lines, *ELSEWHERE.strip().splitlines(), "```", CLOSING])


def redrawn(readme: str) -> str:
    """Return the text of README.md with its map drawn anew."""
    pattern = re.compile(f"{re.escape(OPENING)}.*?{re.escape(CLOSING)}", re.DOTALL)
    return pattern.sub(lambda _: draw(), readme)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(redrawn(readme.read_text()))
