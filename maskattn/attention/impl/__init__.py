"""The implementations of attention, one for each name of ``impl``; none imports another."""
