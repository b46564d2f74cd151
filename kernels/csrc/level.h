// The kernels for one instruction set, under its name: distillation_avx2 and so on. Everything in the
// headers has internal linkage, so that no function of one level can stand in for another's.
#include "accumulate.h"
#include "distillation.h"
#include "ensemble.h"
#include "hidden_cosine.h"
#include "product.h"
#include "scale.h"

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)

int JOIN(distillation, LEVEL)(const distilfast_distillation_args* a, int threads) {
    return distillation(*a, threads);
}
int JOIN(hidden_cosine, LEVEL)(const distilfast_cosine_args* a, int threads) {
    return hidden_cosine(*a, threads);
}
int JOIN(combine_teachers, LEVEL)(const distilfast_ensemble_args* a, int threads) {
    return combine_teachers(*a, threads);
}
int JOIN(scale, LEVEL)(const distilfast_scale_args* a, int threads) { return scale(*a, threads); }
int JOIN(accumulate, LEVEL)(const distilfast_accumulate_args* a, int threads) {
    return accumulate(*a, threads);
}
int JOIN(product, LEVEL)(const distilfast_product_args* a, int threads) { return product(*a, threads); }
