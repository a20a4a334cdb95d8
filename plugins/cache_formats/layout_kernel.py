"""What kernels ask a cache format while they are compiled."""

from triton import constexpr_function

from latentrt.plugins.cache_formats import FORMATS


@constexpr_function
def kind(FORMAT):
    """Which of the files *_kernel.py reads and writes it."""
    return FORMATS[FORMAT].kernel


@constexpr_function
def width(FORMAT, RANK, ROPE):
    """Elements of a token."""
    return FORMATS[FORMAT].width(RANK, ROPE)


@constexpr_function
def start(FORMAT, FIELD, RANK, ROPE):
    """Where a field begins in a token, in elements."""
    return FORMATS[FORMAT].start(FIELD, RANK, ROPE)


@constexpr_function
def bits(FORMAT, FIELD):
    """Bits of one of the field's integers: those of all its planes."""
    return sum(f.bits for f in FORMATS[FORMAT].fields(64, 64) if f.name.split(".")[0] == FIELD)


@constexpr_function
def group(FORMAT, RANK):
    """Elements of a latent that share a scale."""
    return next(f.group for f in FORMATS[FORMAT].fields(RANK, 64) if f.name == "latent") or RANK


@constexpr_function
def folds(FORMAT):
    """Whether attention applies a latent's scale to its score and weight (CacheFormat.folds)."""
    return FORMATS[FORMAT].folds
