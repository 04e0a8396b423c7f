//! Says what a program sees in a jail: its name and arguments, its user, its environment, what is in the root, its
//! descriptors.
use std::fs;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    println!("args={}", args.join(" "));
    println!("variables={}", std::env::vars_os().count());
    let mut names: Vec<String> = fs::read_dir("/")
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    println!("root={}", names.join(" "));
    println!("directory={}", std::env::current_dir().unwrap().display());
    println!("above={}", fs::read_dir("/..").unwrap().count() == names.len());
    println!("socket={}", std::os::unix::net::UnixListener::bind("/run/own").is_ok());
    println!("kvm={}", fs::File::options().read(true).write(true).open("/dev/kvm").is_ok());
}
