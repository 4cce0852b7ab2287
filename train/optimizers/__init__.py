"""One module for each optimiser; its name is what users write as `optimizer.name`.

An optimiser has (see `train.optim.OptimizerKind`):

* `Options`: what can be set under `optimizer.options`;
* `PACKAGE` and `EXTRA`: what has to be installed for it, and the extra of ours that installs it, or None;
* `make(groups, section, options)`: the optimiser itself.
"""
