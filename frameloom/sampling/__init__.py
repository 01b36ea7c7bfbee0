"""Numbers in, numbers out: noise schedules, the Euler and UniPC samplers, guidance; state is explicit."""
