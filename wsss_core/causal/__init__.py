"""The causal heart: what the data set's context is, and how it is averaged out of the classifier.

Back-door adjustment (CONTA Eq. 1) replaces P(Y | X) by

    P(Y | do(X)) = sum_c P(Y | X, M = f(X, c)) P(c).

The normalised weighted geometric mean moves the sum inside the network, so that one pass is enough:

    c_i   = mean over training photos tagged i of class i's own segmented pixels     `confounders`
    alpha = softmax_i((W1 X_m)^T (W2 c_i) / sqrt(n))                                 `intervention`
    M     = sum_i P(c_i) f(X, c_i),  f(X, c_i) = g alpha_i c_i                       `intervention`

n counts the foreground classes; X_m is 1 - p_background of the last round's segmenter. Both maps
live in the canonical frame: the whole picture squashed to s x s cells, whatever its aspect.
`place_context` carries M from there to the crop a network sees.
"""
