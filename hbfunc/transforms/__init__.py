"""Update rules, one file per family; each is a function that returns a `hbfunc.contract.Transform`."""
