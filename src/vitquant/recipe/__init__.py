"""What to do with a model: rules for roles, passes in order, and the decisions taken so far."""

from vitquant.recipe.bits import Bits
from vitquant.recipe.recipe import FLOAT, Pass, Recipe
from vitquant.recipe.run import apply
from vitquant.recipe.state import Rule, State

__all__ = ["FLOAT", "Bits", "Pass", "Recipe", "Rule", "State", "apply"]
