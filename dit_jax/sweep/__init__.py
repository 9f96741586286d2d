"""An isoFLOP ladder: trained, evaluated, fitted, and tested on a larger model."""
