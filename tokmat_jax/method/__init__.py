"""The paper without a model (METHOD is docs/method.md): every equation in the file that its name suggests.

    table         the vocabulary sphere E: look-up, projection, entropy
    maturation    maturity profiles, the simulated tail of training, contraction, shift
    losses        MSE, InfoNCE and its negatives, cross-entropy
    tail          the settings of a generation as numbers
    algorithm     Algorithm 1: predict, contract, commit, shift
    guidance, repulsion, steering, history, stability    the controls, a file each
"""
