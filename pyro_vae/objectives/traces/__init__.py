"""What only the objectives on Pyro's traces need: beta in the scales, matching of sites, KLs by formula."""
