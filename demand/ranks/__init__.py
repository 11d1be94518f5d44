"""Gittins ranks and their relatives: of one age (`gittins`, `variants`), of all ages (`table`)."""
