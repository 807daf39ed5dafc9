//! libFuzzer's program for `foreshore_fuzz::import`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| foreshore_fuzz::import::run(bytes));

// Most mutations would end at a checksum; some still shall.
libfuzzer_sys::fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let size = libfuzzer_sys::fuzzer_mutate(data, size, max_size);
    if !seed.is_multiple_of(16) {
        foreshore_fuzz::tar::repair(&mut data[..size]);
    }
    size
});
