"""Reaction networks from SBML, read by libsbml."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stochdyn._checks import check_type
from stochdyn.errors import InvalidInputError, MissingDependencyError

if TYPE_CHECKING:
    from stochdyn.jumps.reactions import ReactionNetwork

__all__ = ["read_sbml"]


def read_sbml(source: str) -> ReactionNetwork:
    """Return the network of an SBML model; see :meth:`ReactionNetwork.from_sbml` for what it may hold.

    Args:
        source: The path of a file, or SBML as text.
    """
    from stochdyn.jumps.reactions import ReactionNetwork

    check_type(source, str, "source")
    try:
        import libsbml
    except ImportError as error:
        raise MissingDependencyError(
            "reading SBML needs libsbml", hint="pip install 'stochdyn[sbml]'"
        ) from error
    text = source if source.lstrip().startswith("<") else Path(source).read_text(encoding="utf-8")
    document = libsbml.readSBMLFromString(text)
    if document.getNumErrors(libsbml.LIBSBML_SEV_ERROR) or document.getModel() is None:
        raise InvalidInputError(
            "source isn't a model that SBML allows", got=document.getErrorLog().toString()[:200]
        )
    model = document.getModel()
    if model.getNumEvents() or model.getNumRules():
        raise InvalidInputError(
            "a reaction network has no events and no rules",
            got=f"{model.getNumEvents()} events and {model.getNumRules()} rules",
        )
    values = {p.getId(): p.getValue() for p in model.getListOfParameters()}
    values |= {c.getId(): (c.getSize() if c.isSetSize() else 1.0) for c in model.getListOfCompartments()}
    if len({c.getSize() for c in model.getListOfCompartments()}) > 1:
        raise InvalidInputError("compartments of different volume aren't supported")
    initial, fixed = {}, {}
    for species in model.getListOfSpecies():
        amount = (
            species.getInitialAmount() if species.isSetInitialAmount() else species.getInitialConcentration()
        )
        if species.getBoundaryCondition() or species.getConstant():
            fixed[species.getId()] = amount
        else:
            initial[species.getId()] = round(amount)
    reactions, rates = [], []
    for reaction in model.getListOfReactions():
        if reaction.getReversible():
            raise InvalidInputError(
                "write a reversible reaction as two", got=reaction.getId(), hint="one per direction"
            )
        sides = []
        for part in (reaction.getListOfReactants(), reaction.getListOfProducts()):
            terms = [
                f"{int(r.getStoichiometry())} {r.getSpecies()}" for r in part if r.getSpecies() not in fixed
            ]
            sides.append(" + ".join(terms) or "0")
        law = reaction.getKineticLaw()
        own = {p.getId(): p.getValue() for p in law.getListOfParameters()}
        formula = libsbml.formulaToL3String(law.getMath())
        reactions.append(" -> ".join(sides))
        rates.append(_propensity(formula, {**values, **fixed, **own}, list(initial)))
    used = {name for text in reactions for name in re.findall(r"[A-Za-z_]\w*", text)}
    network = ReactionNetwork(reactions, rates, {k: v for k, v in initial.items() if k in used})
    # propensities read counts by name, in the order of the network
    for rate in rates:
        rate.names = network.species
    return network


class _Formula:
    """A kinetic law as a function of counts."""

    def __init__(self, tree: ast.expr, values: Mapping[str, float]) -> None:
        self.tree, self.values = tree, values
        self.names: list[str] = []

    def __call__(self, x: Tensor) -> Tensor:
        known: dict[str, Any] = {**self.values, **{name: x[..., m] for m, name in enumerate(self.names)}}
        return torch.as_tensor(_evaluate(self.tree, known)).to(x).expand(x.shape[:-1])


_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: lambda a, b: a**b,
}


def _propensity(formula: str, values: Mapping[str, float], species: list[str]) -> _Formula:
    """Read arithmetic of amounts and parameters; nothing else is evaluated."""
    try:
        tree = ast.parse(formula.replace("^", "**"), mode="eval").body
    except SyntaxError as error:
        raise InvalidInputError("a kinetic law can't be read", got=formula) from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id not in values and node.id not in species:
            raise InvalidInputError("a kinetic law names an unknown quantity", got=node.id)
    _evaluate(tree, {**values, **dict.fromkeys(species, 1.0)})
    return _Formula(tree, values)


def _evaluate(node: ast.expr, known: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.Name):
        return known[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand, known)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate(node.left, known), _evaluate(node.right, known))
    raise InvalidInputError("a kinetic law holds more than arithmetic", got=ast.unparse(node)[:60])
