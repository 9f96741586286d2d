"""Fits of laws to runs: one type (`fit.Fit`), one bootstrap (`bootstrap`), and one file a method."""

from dit_jax.scaling.fits.isoflop import fit_isoflop
from dit_jax.scaling.fits.points import fit_akima, fit_best
from dit_jax.scaling.fits.repeated import fit_varpro
from dit_jax.scaling.fits.surface import fit_gadre, fit_surface

METHODS = {
    "isoflop": fit_isoflop,
    "varpro": fit_varpro,
    "surface": fit_surface,
    "akima": fit_akima,
    "gadre": fit_gadre,
    "power": fit_best,
}
