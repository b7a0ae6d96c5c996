/* Included before everything else into a build with a regression (-include slower.h): forty instructions more in each copy of a page
 * out of the arena or into it, as somebody's harmless counter might be. The counts must tell. */
#include "_atomics.h"

static volatile unsigned gcma_wasted;
static inline void gcma_waste(void)
{
    for (int i = 0; i < 8; i++)
        gcma_wasted++;
}

#define copy_in(to, from, size) (gcma_waste(), copy_in(to, from, size))
#define copy_out(to, from, size) (gcma_waste(), copy_out(to, from, size))
