//! libFuzzer's program for `foreshore_fuzz::quantity`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| foreshore_fuzz::quantity::run(bytes));
