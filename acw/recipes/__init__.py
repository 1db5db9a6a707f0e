"""Every field of a run, with its unit and range (recipe.py), and the named recipes (named.py)."""

from acw.recipes.fields import Range
from acw.recipes.named import RECIPES, named_recipe
from acw.recipes.recipe import Recipe, derive

__all__ = ["RECIPES", "Range", "Recipe", "derive", "named_recipe"]
