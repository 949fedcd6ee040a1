// Checks of what Python has promised. Users meet the sentences of danet_kernels/_checks.py first; these guard our own
// bugs.
#pragma once

#include <torch/headeronly/util/Exception.h>

#define DANET_CHECK_EQUAL(what, got, expected) \
  STD_TORCH_CHECK((got) == (expected), what, ": expected ", (expected), ", got ", (got))

#define DANET_CHECK_SHAPE(name, tensor, rows, columns)                                                             \
  STD_TORCH_CHECK((tensor).dim() == 3 && (tensor).size(1) == (rows) && (tensor).size(2) == (columns), name,        \
                  ": expected shape [B, ", (rows), ", ", (columns), "], got ", (tensor).dim(), " dimensions with [", \
                  (tensor).size(0), ", ", (tensor).size(1), ", ...]")
