"""Training on real images: ``senet-fused train``, alone or under torchrun.

command       the options, and what is refused before anything is trained
settings      those of them that change the result; a resumed run must have the same
network       the model by its name, how its SE layers run, and what a checkpoint says of it
loop          steps, epochs, and when to save, evaluate and stop
evaluation    top-1 and top-5 over all processes
schedule      the learning rate, step by step
processes     torchrun and torch.distributed; signals that end a run
state         what a checkpoint holds of a run, and putting it back
checkpoint    the file that holds it
data          images, labels and the order in which they come
logs          CSV, TensorBoard and the terminal
curves        the picture of a run
"""
