"""Modules of this package as one plain source file that needs torch alone: what is written for transformers.

Definitions that the wanted ones need are taken over with their comments, in an order that Python accepts. Choices
between backends are settled for plain torch, and what only other backends need is left out.
"""

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Symbol = tuple[str, str]
"""A module and the name of a definition in it."""
_PACKAGE = "genossm"
_SHAPES = re.compile(r'\b(?:Bool|Complex|Float|Int|Integer|Shaped|UInt8)\[(\w+), "[^"]*"\]')
_BACKEND = "torch"


@dataclass
class _Definition:
    """A top-level definition: a function, a class, or a constant with the string that describes it."""

    nodes: list[ast.stmt]
    text: str
    changed: bool


@dataclass
class _Module:
    """What is at the top of one module."""

    name: str
    definitions: dict[str, _Definition] = field(default_factory=dict)
    imported: dict[str, Symbol] = field(default_factory=dict)
    """Definitions of this package by the name that they have here."""
    modules: dict[str, str] = field(default_factory=dict)
    """Modules of this package by the name that they have here."""
    outside: dict[str, str] = field(default_factory=dict)
    """Import statements of other packages by the name that they bind."""


def merge(wanted: Iterable[Symbol]) -> str:
    """Return one source text with definitions and all that they need.

    Args:
        wanted: definitions of this package; they keep their names.

    Raises:
        ValueError: a definition is reached that plain torch can't run.
    """
    shelf: dict[str, _Module] = {}
    order: list[Symbol] = []
    keeping = list(wanted)

    def reach(symbol: Symbol, within: tuple[Symbol, ...] = ()) -> None:
        if symbol in order or symbol in within:
            return
        module = _read(symbol[0], shelf)
        if symbol[1] not in module.definitions:
            raise ValueError(f"{symbol[1]} of {symbol[0]} can't be written into one file for plain torch.")
        definition = module.definitions[symbol[1]]
        # What runs while the file is read comes first; bodies of functions find their names later.
        for needed in _needs(_at_once(definition.nodes[0]), module):
            reach(needed, (*within, symbol))
        order.append(symbol)
        for needed in _needs(definition.nodes, module):
            reach(needed)

    for symbol in keeping:
        reach(symbol)
    names = _final_names(order, keeping)
    used = (_outside(shelf[module], shelf[module].definitions[name]) for module, name in order)
    imports = sorted(set().union(*used))
    plain = [line for line in imports if line.startswith("import ")]
    texts = [_written(shelf[module], shelf[module].definitions[name], names) for module, name in order]
    others = [line for line in imports if line not in plain]
    return "\n".join([*plain, *others, "", "", "\n\n\n".join(texts), ""])


def _read(name: str, shelf: dict[str, _Module]) -> _Module:
    if name in shelf:
        return shelf[name]
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    source = _SHAPES.sub(r"\1", Path(spec.origin).read_text())
    module = shelf[name] = _Module(name)
    lines = source.splitlines()
    tree = ast.parse(source)
    before = 0
    for node in tree.body:
        start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        comments = [line for line in lines[before : start - 1] if line.startswith("#")]
        before = node.end_lineno or node.lineno
        text = "\n".join([*comments, *lines[start - 1 : before]])
        if isinstance(node, ast.Import | ast.ImportFrom):
            _import(node, module)
        elif isinstance(node, ast.Expr):
            _describe(node, text, module)
        else:
            plain = ast.dump(node)
            folded = _Fold().visit(node)
            for target in _bound(node):
                module.definitions[target] = _Definition([folded], text, ast.dump(folded) != plain)
    return module


def _describe(node: ast.Expr, text: str, module: _Module) -> None:
    """Keep the string below a constant with it."""
    last = next(reversed(module.definitions.values()), None)
    if last is not None and isinstance(last.nodes[0], ast.Assign | ast.AnnAssign):
        last.nodes.append(node)
        last.text += f"\n{text}"


def _bound(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def _import(node: ast.Import | ast.ImportFrom, module: _Module) -> None:
    for alias in node.names:
        local = alias.asname or alias.name.partition(".")[0]
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == _PACKAGE:
            inner = f"{node.module}.{alias.name}"
            if _is_module(inner):
                module.modules[local] = inner
            else:
                module.imported[local] = (str(node.module), alias.name)
        else:
            one = ast.ImportFrom(node.module, [alias], 0) if isinstance(node, ast.ImportFrom) else ast.Import([alias])
            module.outside[local] = ast.unparse(one)


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


class _Fold(ast.NodeTransformer):
    """Settles choices between backends for plain torch."""

    def __init__(self) -> None:
        self.known: dict[str, ast.Constant] = {}

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        outer = self.known
        self.known = dict[str, ast.Constant]()
        plain = ast.dump(node)
        self.generic_visit(node)
        self.known = outer
        if ast.dump(node) != plain:
            _drop_unread(node)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        called = node.value.func if isinstance(node.value, ast.Call) else None
        name = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
        if name == "choose" and node.attr == "name":
            return ast.Constant(_BACKEND)
        if name == "import_module":
            # The table of kernels stands for the one that is chosen; see `_resolve`.
            return ast.Attribute(ast.Name("_KERNELS", ast.Load()), node.attr, node.ctx)
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> Any:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return ast.Constant(_BACKEND) if name == "beside_triton" else self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> Any:
        self.generic_visit(node)
        if (
            isinstance(node.value, ast.Constant)
            and node.value.value == _BACKEND
            and isinstance(node.targets[0], ast.Name)
        ):
            self.known[node.targets[0].id] = node.value
            return None
        return node

    def visit_Name(self, node: ast.Name) -> Any:
        return self.known.get(node.id, node) if isinstance(node.ctx, ast.Load) else node

    def visit_Compare(self, node: ast.Compare) -> Any:
        self.generic_visit(node)
        left, right = node.left, node.comparators[0]
        if isinstance(left, ast.Constant) and isinstance(right, ast.Constant) and isinstance(node.ops[0], ast.Eq):
            return ast.Constant(left.value == right.value)
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> Any:
        self.generic_visit(node)
        settled = [value.value for value in node.values if isinstance(value, ast.Constant)]
        if isinstance(node.op, ast.And) and False in settled:
            return ast.Constant(False)
        return node

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        if isinstance(node.test, ast.Constant):
            return node.body if node.test.value else node.orelse
        # A branch in which nothing but the choice of a backend stood is empty now.
        node.body = node.body or [ast.Pass()]
        return node if node.orelse or not isinstance(node.body[0], ast.Pass) else None

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        self.generic_visit(node)
        return (node.body if node.test.value else node.orelse) if isinstance(node.test, ast.Constant) else node


def _drop_unread(function: ast.FunctionDef) -> None:
    """Take out assignments whose names nothing reads any more."""
    while True:
        names = [name for name in ast.walk(function) if isinstance(name, ast.Name)]
        read = {name.id for name in names if isinstance(name.ctx, ast.Load)}
        unread = [
            node
            for node in function.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id not in read
        ]
        if not unread:
            return
        function.body = [node for node in function.body if node not in unread]


def _names(node: ast.AST, hidden: frozenset[str] = frozenset()) -> Iterator[ast.Name | ast.Attribute]:
    """Yield the names in a definition that stand for something outside it."""
    if isinstance(node, ast.FunctionDef | ast.Lambda):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        stored = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        hidden = hidden | stored | {argument.arg for argument in arguments if argument is not None}
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id not in hidden:
        yield node
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in hidden:
        yield node
    for child in ast.iter_child_nodes(node):
        yield from _names(child, hidden)


def _resolve(node: ast.Name | ast.Attribute, module: _Module) -> Symbol | None:
    """Return the definition of this package that a name stands for, if any."""
    if isinstance(node, ast.Attribute):
        assert isinstance(node.value, ast.Name)
        if node.value.id == "_KERNELS":
            return _kernel_module(module.name), node.attr
        return (module.modules[node.value.id], node.attr) if node.value.id in module.modules else None
    if node.id in module.imported:
        return module.imported[node.id]
    return (module.name, node.id) if node.id in module.definitions else None


def _kernel_module(name: str) -> str:
    parent, _, leaf = name.rpartition(".")
    return f"{parent}.kernels.{leaf}_{_BACKEND}"


def _at_once(node: ast.stmt) -> list[ast.AST]:
    """Return the parts of a definition that Python runs when it reads it: not bodies of functions, nor annotations."""
    if isinstance(node, ast.FunctionDef):
        defaults = [default for default in node.args.kw_defaults if default is not None]
        return [*node.decorator_list, *node.args.defaults, *defaults]
    if isinstance(node, ast.ClassDef):
        inside = [part for statement in node.body for part in _at_once(statement)]
        return [*node.decorator_list, *node.bases, *(keyword.value for keyword in node.keywords), *inside]
    if isinstance(node, ast.AnnAssign):
        return [] if node.value is None else [node.value]
    return [node]


def _needs(roots: Iterable[ast.AST], module: _Module) -> list[Symbol]:
    found: dict[Symbol, None] = {}
    inside: set[int] = set()
    for root in roots:
        for node in _names(root):
            symbol = None if id(node) in inside else _resolve(node, module)
            if isinstance(node, ast.Attribute) and symbol is not None:
                inside.add(id(node.value))
            if symbol is not None:
                found[symbol] = None
    return list(found)


def _outside(module: _Module, definition: _Definition) -> set[str]:
    used = {n.id for root in definition.nodes for n in ast.walk(root) if isinstance(n, ast.Name)}
    return {line for name, line in module.outside.items() if name in used}


def _final_names(order: list[Symbol], keeping: list[Symbol]) -> dict[Symbol, str]:
    """Return a name for each definition; where two have one, the later one is called after its module too."""
    final: dict[Symbol, str] = {symbol: symbol[1] for symbol in keeping}
    for module, name in order:
        if (module, name) in final:
            continue
        stem = module.rpartition(".")[2]
        taken = set(final.values())
        free = name if name not in taken else stem if stem not in taken and name in stem else f"{name}_{stem}"
        final[module, name] = free
    return final


class _Rename(ast.NodeTransformer):
    def __init__(self, new: dict[int, str]):
        self.new = new

    def visit_Name(self, node: ast.Name) -> Any:
        return ast.Name(self.new[id(node)], node.ctx) if id(node) in self.new else node

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        return ast.Name(self.new[id(node)], ast.Load()) if id(node) in self.new else self.generic_visit(node)


def _written(module: _Module, definition: _Definition, names: dict[Symbol, str]) -> str:
    """Return the source of a definition with the names that things have in the one file."""
    new: dict[int, str] = {}
    for root in definition.nodes:
        for node in _names(root):
            symbol = _resolve(node, module)
            if symbol is not None and symbol in names and (isinstance(node, ast.Attribute) or names[symbol] != node.id):
                new[id(node)] = names[symbol]
    own = _bound(definition.nodes[0])
    renamed = [name for name in own if names.get((module.name, name), name) != name]
    if not new and not renamed and not definition.changed:
        return definition.text
    written = [_Rename(new).visit(root) for root in definition.nodes]
    first = written[0]
    if renamed and isinstance(first, ast.FunctionDef | ast.ClassDef):
        first.name = names[module.name, first.name]
    elif renamed:
        for node in ast.walk(first):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                node.id = names.get((module.name, node.id), node.id)
    return "\n".join(ast.unparse(ast.fix_missing_locations(node)) for node in written)
