#include <omp.h>
#include <stdio.h>
int main(void) {
    enum { N = 300 };
    static double a[N][N], b[N][N], c[N][N];
    double sum = 0;
    int seen = 0;
    omp_set_num_threads(4);
#pragma omp parallel
#pragma omp atomic
    seen++;
#pragma omp parallel for
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++)
            a[i][j] = i + j, b[i][j] = i - j;
#pragma omp parallel for schedule(dynamic, 7)
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++)
            for (int k = 0; k < N; k++)
                c[i][j] += a[i][k] * b[k][j];
#pragma omp parallel for reduction(+ : sum)
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++)
            sum += c[i][j];
    long tasks = 0;
#pragma omp parallel
#pragma omp single
    for (int i = 0; i < 100; i++)
#pragma omp task shared(tasks)
    {
#pragma omp critical
        tasks += i;
    }
    printf("%d threads, %.0f, %ld\n", seen, sum, tasks);
    return 0;
}
