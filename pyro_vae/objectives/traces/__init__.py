"""Parts of the objectives on Pyro's traces: beta in the scales, matching of sites, analytic KLs."""
