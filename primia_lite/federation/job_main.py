"""A hospital's part of a round: train on its films, from the global weights. Runs there, as a job of its own."""

from primia_lite.federation.hospital import local_update
from primia_lite.federation.study import Round

if __name__ == "__main__":
    here = Round.here()
    update = local_update(
        here.weights, here.films, here.study.training, here.study.privacy, here.rng, declared_size=here.declared_size
    )
    here.save(update)
