// The functions of a level, under its name: distillation_avx2 and so on.
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
