"""The letters that tensor names end in, one meaning each for the whole package: ``x_BTD`` is (B, T, D).

A batch and its sequences
    B   packed sequences of a batch, or images that are generated together
    T   tokens of a sequence, or of all sequences of a batch where they are flattened
    D   width of a token's vector: of the decoder, or of the input of a function that knows no model
    V   vocabulary
    A   axes of a position: (temporal, height, width) for a token, (row, column) for a patch
    J   tasks
    N   items of a list, explained by the module: copies of tokens sorted by expert, selected tokens, keys of a mask

Images
    H   height in pixels or positions of a latent grid
    W   width in pixels or positions of a latent grid
    C   channels: of an image, of latents, of one attention head
    P   patches of input images (ViT patches)
    Q   numbers in a flattened ViT patch
    S   width of the image encoder
    I   tokens of input images, as the decoder reads them
    L   latent tokens of target images
    Z   numbers in a flattened latent patch

Attention
    U   attention heads
    u   key/value heads, a divisor of U
    R   rotary frequencies

Mixture of experts
    E   experts of a layer in group-major order, or of one group
    e   the subset of experts that this rank holds, or that a modality can reach
    F   hidden width of an expert or another feed-forward; output width of a linear layer that stands alone
    G   expert groups
    K   experts chosen per token
    M   modalities
    X   ranks of the expert-parallel mesh axis
    Y   MoE layers
    n   copies of tokens in one expert group
    t   tokens routed to one expert group

A digit is a dimension of that size: ``t_BL1`` is (B, L, 1). Parameters, buffers and config fields carry no suffix.
"""
