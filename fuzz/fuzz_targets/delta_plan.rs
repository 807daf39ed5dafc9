//! libFuzzer's program for `foreshore_fuzz::delta`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| foreshore_fuzz::delta::run_plan(bytes));
