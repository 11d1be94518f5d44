# A package, or else another one named "tests" on the path (ciw installs one) is taken for it.
