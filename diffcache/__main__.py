from diffcache.cli import main

main()
