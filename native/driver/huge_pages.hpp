// Advice to the kernel about fresh output memory.
#pragma once

#include "batchnorm.hpp"

namespace batchnorm {

// Asks for huge pages under a large array that is about to be written for the first time: faults
// on small pages cost more than the arithmetic. Without effect where the system has none.
void advise_huge_pages(const Array& array, const Step& step);

}  // namespace batchnorm
