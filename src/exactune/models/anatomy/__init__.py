"""Read what a model's parts are and how they are wired, from modules, shapes and behaviour; nothing here looks at a class name.

`watch` records what happens in one pass; `norm`, `mlp`, `experts` and `attention` each try to explain a module's numbers by a
formula that we have; `layer` puts a whole decoder layer together. What is read is a hypothesis: `verify` proves it before anything is
swapped.
"""

from exactune.models.anatomy.watch import Unrecognised as Unrecognised
