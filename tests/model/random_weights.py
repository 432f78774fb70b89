"""Random weights for the decoders that tests compute with."""

import torch


def randomize(model, seed, scale=1.0, norms=False):
    """Fill a model in place with normal weights, which keep activations as large as they are times `scale`.

    Args:
        model: any module; its experts, if it has some, are stacked in three dimensions.
        seed: of the values, which depend on nothing else.
        scale: 1 if every part shall move the logits; 2 if the likeliest token shall be far ahead of the second.
        norms: whether vectors are filled, too, from 0.5 to 1.5.

    Returns:
        The model.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, scale * parameter.shape[-1] ** -0.5, generator=generator)
            elif norms:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model
