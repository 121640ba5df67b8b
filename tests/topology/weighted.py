"""Random weighted graphs to test on."""

from hypothesis import strategies as st

from uoe_jax.topology import make_graph


@st.composite
def graphs(draw, most=24, connected=True):
    """A random weighted graph, with a spanning tree if it is to be connected."""
    size = draw(st.integers(1, most))
    weight = st.floats(0.125, 8, width=16)
    edges = []
    if connected:
        for v in range(1, size):
            edges.append((draw(st.integers(0, v - 1)), v, draw(weight)))
    vertex = st.integers(0, size - 1)
    edges += draw(st.lists(st.tuples(vertex, vertex, weight), max_size=2 * size))
    return make_graph(size, edges)
