"""Training on images: ``senet-fused train``, alone or under torchrun.

command       the options
session       a run from its options to its last file
network       the model by its name
data          images, the order in which they come, and loaders
loop          steps, epochs, evaluation, and when to save and stop
schedule      the learning rate of every step
processes     torchrun and torch.distributed; signals that stop a run
checkpoint    the file that holds the state of a run
logs          CSV, TensorBoard and the terminal
"""
