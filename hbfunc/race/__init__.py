"""A race between optimizers: `python -m hbfunc.race` trains a small network on real data with each of them.

Every optimizer runs over the same grid of learning rates, from the same initializations and on the same batches, and a
whole grid is *one* training: parameters and optimizer state carry a leading dimension of lanes, one lane for each
learning rate and initialization, and `torch.vmap` maps the step over it. So the race is also a worked example of the
functional interface:

    tasks     what is trained: data, model, loss and score
    recipes   who takes part: a name and a function from learning rate to Transform
    train     the vmapped training of one optimizer's lanes
    fsdp      the same numbers on several ranks, under FSDP2
    report    who won: the table, the picture and the JSON
    __main__  the command line
"""
