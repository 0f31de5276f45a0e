"""The optimizers, a file per family: recipes, chains that read like their papers, and the classes made of them.

Options that all recipes share are described in `hbfunc.pipeline.around`.
"""
