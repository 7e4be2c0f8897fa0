"""Which stored name is which weight of a family: prefixes that others leave behind, and what is no language model."""

import re

import numpy as np

from tokmat_jax.config import Config
from tokmat_jax.errors import UserError
from tokmat_jax.hf import families
from tokmat_jax.hf.families import Weight
from tokmat_jax.hf.files import Stored

_WRAPPERS = r"^(_orig_mod\.|module\.)+"
"""What torch.compile and data parallelism put before every name."""
_FOREIGN = {
    "base_model.model.": "was saved from inside PEFT: merge the adapter there (merge_and_unload) and save again, or "
                         "give the folder of the adapter",
    "language_model.": "belongs to a model that also reads images: save its language model alone",
    "model.language_model.": "belongs to a model that also reads images: save its language model alone",
}
_OTHER_HEADS = r"^(score|classifier|qa_outputs|v_head|classification_head)\."


def layers_of(weight: Weight, config: Config) -> range:
    """The layers that have a `weight`; one for a weight outside the blocks."""
    return range(config.model.num_layers if weight.per_layer else 1)


def match_names(
    stored: Stored, model_type: str, config: Config, tied: bool, weights: list[Weight],
    shapes: dict[str, tuple[int, ...]],
) -> tuple[dict[str, str], list[str]]:
    """The name in the file of every weight of the family, and notes; raises UserError if names or shapes do not match.

    `shapes` are those of our parameters by path.
    """
    names, notes = _plain_names(stored, families.FAMILIES[model_type].prefix)
    table, head = weights[0].name, families.FAMILIES[model_type].head
    if families.HEAD in names and head not in names:
        names[head] = names.pop(families.HEAD)
    if tied and table not in names and head in names:
        names[table] = names[head]
        notes.append(f"the table is stored as {names[head]} alone, and is tied")
    copy = names.pop(head, None) if tied else None
    shapes = {"readout": shapes["table"]} | shapes
    wanted = {weight.name.format(layer=layer): families.stored_shape(weight, shapes) for weight in weights
              for layer in layers_of(weight, config)}
    for name, shape in wanted.items():
        if name not in names:
            raise UserError(f"weight {name} is missing, config.json asks for one of shape {shape}")
        found = stored.shapes[names[name]]
        if found != shape:
            raise UserError(f"weight {name} has shape {found}, config.json asks for {shape}")
    if unknown := [name for name in names if name not in wanted]:
        raise UserError(f"weight {unknown[0]} is unknown" + (f", and {len(unknown) - 1} more" if unknown[1:] else "")
                        + f": a {model_type} model with these settings has no such weight")
    if copy is not None and not np.array_equal(stored.read(copy), stored.read(names[table])):
        raise UserError(f"{head} differs from the table, although config.json ties them (tie_word_embeddings)")
    return names, notes


def _plain_names(stored: Stored, prefix: str) -> tuple[dict[str, str], list[str]]:
    """Stored names by the name of the family, without what else was put before them, and notes."""
    own = {re.sub(_WRAPPERS, "", name): name for name in stored.shapes
           if not families.is_constant(name)}
    changed = [name for plain, name in own.items() if plain != name]
    for name in own:
        for before, what in _FOREIGN.items():
            if name.startswith(before):
                raise UserError(f"weight {name} {what}")
        if re.match(_OTHER_HEADS, name):
            raise UserError(f"weight {name} is the head of a classifier: this is no language model, and what it would "
                            f"write is unknown; give the checkpoint that it was made from")
    bare = not any(name.startswith(prefix) for name in own)
    heads = {families.HEAD, *(family.head for family in families.FAMILIES.values())}
    names = {prefix + name if bare and name not in heads else name: whole for name, whole in own.items()}
    return names, [f"names are read without what precedes them: {changed[0]}, …"] if changed else []
