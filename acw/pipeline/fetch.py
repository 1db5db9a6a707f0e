"""Fetches the weights of all networks of a recipe, for a machine, or a cluster's image, that will have no network.

acw fetch RECIPE

They are kept on this machine, below ACW_CACHE (default: ~/.cache) or in the model hub's own cache. Each node needs
them.
"""

from __future__ import annotations

from collections.abc import Sequence

from acw.pipeline.job import add_fields, add_recipe_name, read_options, recipe_of
from acw.pipeline.options import Parser
from acw.recipes import Recipe, named_recipe


def add_options(parser: Parser, base: Recipe | None = None) -> None:
    add_recipe_name(parser)
    add_fields(parser, base or named_recipe("acw"))


def main(argv: Sequence[str]) -> None:
    recipe = recipe_of(read_options(argv, __doc__, add_options))
    from acw.features.backbone import load_backbone

    for backbone in recipe.backbone_values:
        network = load_backbone(backbone)
        source = backbone.weights.partition("#")[0]
        size = sum(tensor.nbytes for tensor in network.state().values()) / 1e6
        print(f"{backbone.name}: {source}, {size:.0f} MB, SHA-256 {network.weights_sha256}", flush=True)
