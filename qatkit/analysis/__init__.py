"""Look at a prepared model: which layers lose most, and how many bits each of them needs."""
