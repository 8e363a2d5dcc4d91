// Advice to the operating system about fresh output memory.
#pragma once

#include "batchnorm.hpp"

namespace batchnorm {

// Asks for huge pages under a large array that is about to be written for the first time: faults
// on small pages cost more than the arithmetic. No effect where the system has no huge pages.
void advise_huge_pages(const Array& array, const Step& step);

}  // namespace batchnorm
